"""Backbones by name (`ARCHS`, `find_arch`) and the embedding network on top (`EmbeddingNet`, `networkselect`)."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import partial
from http.client import HTTPException
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

import googlenet
from auxiliaries import (
    FlagParser,
    UserError,
    check_memory,
    find_device,
    first_rank_first,
    load_checkpoint,
    nearest_name,
    notice,
    number,
    reason,
    shown,
    user_path,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# What training programs put around a state dict, and before its names.
WRAPPERS = ("state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.", "model.")

EMBEDDER_NORMS = ("none", "layernorm")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
POOLINGS = ("avg", "max", "avg+max", "gem", "cls")
SIZE_ERRORS = (AssertionError, RuntimeError, ValueError)  # of networks that get images of a size that they can't take
TIMM = "timm:"  # before the names of timm's networks
LORA_PARENTS = ("attn", "attention", "self_attention", "mlp", "ffn")  # what low-rank adapters are put into
# torchvision's networks that pool in a function: where their last map is, and whether a ReLU follows it.
FUNCTIONAL_POOLING = {
    "DenseNet": ("features", True), "MobileNetV2": ("features", False), "MNASNet": ("layers", False),
    "ShuffleNetV2": ("conv5", False),
}  # fmt: skip


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of the network."""
    group = parser.add_argument_group("network")
    add = group.add_argument
    # fmt: off
    add("--arch", default="resnet50", metavar="NAME", fixed=True,
        help="resnet50, googlenet, another classification network of torchvision (resnet18, vit_b_16, …), or timm:NAME "
        "for one of timm (timm:vit_small_patch14_dinov2.lvd142m, timm:convnext_tiny, …)")
    add("--embed_dim", type=number(int, 0), fixed=True,
        help="embedding dimension; 0: the backbone's features themselves are the embedding (default: 128; googlenet: "
        "512)")
    add("--embedder", type=number(int, 1), nargs="*", default=[], metavar="N", fixed=True,
        help="widths of hidden layers before the embedding layer, each followed by a ReLU, such as 512 256")
    add("--embedder_norm", choices=EMBEDDER_NORMS, default="none", fixed=True,
        help="layernorm: scale the backbone's features, before any layer of the embedding, to mean 0 and variance 1 "
        "per image, without parameters, as ProxyNCA++ does")
    add("--not_pretrained", action="switch", default=None,
        help="start from random weights instead of pretrained ones (default: if the architecture has no others)")
    add("--weights", type=user_path, metavar="FILE",
        help="start from the state dict in FILE, .pth or .safetensors, instead of downloading one")
    add("--freeze_batchnorm", action="switch", default=None,
        help="keep BatchNorm's running statistics fixed; its affine parameters still learn (default: if pretrained)")
    add("--freeze_trunk", action="switch", fixed=True,
        help="train only what stands behind the backbone, which stays as it is (a linear probe): quick, and often "
        "enough for a strong pretrained backbone")
    add("--freeze_layers", type=pattern, nargs="+", metavar="PATTERN", fixed=True,
        help="regular expressions: the backbone's parameters whose names begin so don't learn, such as conv1 bn1 "
        "layer[12], and BatchNorm there keeps its statistics")
    add("--lora", type=number(int, 1), metavar="R", fixed=True,
        help="train low-rank adapters of rank R on the linear layers of the backbone's attention and MLP blocks, and "
        "leave the rest of the backbone as it is; try 8 (Hu et al., ICLR 2022)")
    add("--pooling", choices=POOLINGS, fixed=True,
        help="how the backbone's last map or tokens become one vector: avg+max is their sum, as in Proxy-Anchor; gem "
        "learns its exponent with the backbone, from 3 on (Radenovic et al., TPAMI 2019); cls is a transformer's class "
        "token (default: as the network was made)")
    add("--cascade_layers", nargs="*", metavar="NAME", fixed=True,
        help="CascadedEmbeddings: modules of the backbone whose pooled outputs each get a head (default: the ends of "
        "three stages, for ResNets layer2 layer3 layer4)")

    add = parser.add_argument_group("pictures of the network", machine=True, compared=False).add_argument
    add("--attention", action="switch",
        help="also draw, for the sample retrievals, where in query and neighbor their similarity comes from, as "
        "attention.png; with --evaluate: as attention_<split>.png. It takes a few seconds on a CPU")

    add = parser.add_argument_group("speed of the network").add_argument
    add("--precision", choices=PRECISIONS,
        help="of the backbone's arithmetic: bf16 or fp16 are quicker and take less memory on a GPU that has them, with "
        "weights, embedding layer and loss still in 32 bits (default: fp32; with --fast, what the device is quick at)")
    add("--channels_last", action="switch", default=None, machine=True, compared=False,
        help="keep the channels of a pixel side by side in memory, which convolutions may be quicker with (default: "
        "only with --fast)")
    add("--compile", action="switch", default=None, machine=True, compared=False,
        help="compile the backbone with torch.compile: the first steps take minutes, those after them are quicker "
        "(default: only with --fast, where it pays)")
    add("--sync_batchnorm", action="switch", machine=True, compared=False,
        help="with several processes, each on a GPU of its own, let BatchNorm that isn't frozen normalize over the "
        "images of all of them, as one process would")
    add("--grad_cache", type=number(int, 1), metavar="N",
        help="run the backbone on N images at a time, and once more for their gradients, so that a large --bs takes "
        "the memory of N images; the gradients are those of the whole batch (Gao et al., RepL4NLP 2021)")
    # fmt: on


def pattern(text: str) -> str:
    """An argparse type: a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is not a regular expression: {error}") from None
    return text


class Weights(Enum):
    """Where a backbone's weights come from."""

    RANDOM = "random"
    LOADED_LATER = "loaded later"  # built for pretrained weights, which the caller then loads from a file or checkpoint
    DOWNLOADED = "downloaded"

    @property
    def are_pretrained(self) -> bool:
        """Whether they are, or will be, pretrained ones."""
        return self is not Weights.RANDOM

    @property
    def are_downloaded(self) -> bool:
        """Whether the builder itself loads them."""
        return self is Weights.DOWNLOADED


@dataclass(frozen=True)
class Arch:
    """An architecture's row.

    Attributes:
        build: from `Weights` to a backbone and its number of output features.
        has_weights: whether there are pretrained weights, which `build` then loads for `Weights.DOWNLOADED`.
        crop_size: side of its input, px.
        resize: shorter side of a test image before its center crop, px.
        embed_dim: default embedding dimension.
        mean, std: of its input, per channel, for images in 0 … 1.
        interpolation: how images are resized for it, bilinear or bicubic.
        is_sized: whether `build` also takes the side of its input, px.
    """

    build: Callable[..., tuple[nn.Module, int]]
    crop_size: int = 224
    resize: int = 256
    embed_dim: int = 128
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    has_weights: bool = False
    interpolation: str = "bilinear"
    is_sized: bool = False


def build_torchvision(name: str, weights: Weights, weights_name: str = "DEFAULT") -> tuple[nn.Module, int]:
    """A classification network of torchvision without its last layer, and its number of features."""
    from torchvision.models import get_model, get_model_weights

    published = get_model_weights(name)[weights_name]
    if weights.are_downloaded:
        network = get_model(name, weights=published)
    elif name == "inception_v3":
        network = get_model(
            name, aux_logits=False, transform_input=weights.are_pretrained, init_weights=not weights.are_pretrained
        )
    elif name == "vit_h_14":  # its weights are for another image size than its constructor's default
        network = get_model(name, image_size=published.transforms().crop_size[0])
    else:
        network = get_model(name)
    if name == "inception_v3":
        network.aux_logits, network.AuxLogits = False, None
    return network, remove_classifier(network, name)


def remove_classifier(network: nn.Module, name: str) -> int:
    """Replaces the last layer by the identity and returns its number of input features.

    Raises:
        UserError: the last layer isn't a Linear.
    """
    linears = [(path, module) for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linears or linears[-1][1].out_features != 1000:
        raise UserError(f"--arch {name} does not end in a Linear layer that an embedding could replace: choose another")
    path, last = linears[-1]
    parent, _, attribute = path.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    return last.in_features


ARCHS: dict[str, Arch] = {  # find_arch also knows torchvision's other classification networks
    "resnet50": Arch(partial(build_torchvision, "resnet50", weights_name="IMAGENET1K_V1"), has_weights=True),
    "googlenet": Arch(googlenet.build, googlenet.CROP_SIZE, googlenet.RESIZE, googlenet.EMBED_DIM, has_weights=True),
}


def find_arch(name: str) -> Arch:
    """The row of an architecture: the one in `ARCHS`, or one for a network of torchvision with the input that it wants.

    Raises:
        UserError: there is no architecture of that name.
    """
    if name in ARCHS:
        return ARCHS[name]
    if name.startswith(TIMM):
        return find_timm(name.removeprefix(TIMM))

    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        near = nearest_name(name, [*ARCHS, *names])
        raise UserError(
            f"--arch {shown(name)} is unknown{near}: give resnet50, googlenet, a classifier of torchvision.models, or "
            f"{TIMM}NAME for a network of timm"
        )
    wanted = torchvision.models.get_model_weights(name)["DEFAULT"].transforms()
    return Arch(
        partial(build_torchvision, name),
        crop_size=wanted.crop_size[0],
        resize=wanted.resize_size[0],
        mean=tuple(wanted.mean),
        std=tuple(wanted.std),
        has_weights=True,
        interpolation="bicubic" if "bicubic" in str(wanted.interpolation) else "bilinear",
    )


def find_timm(name: str) -> Arch:
    """The row of a network of timm, with the input that its weights want.

    Args:
        name: timm's, with or without the tag of its weights, such as `vit_small_patch14_dinov2.lvd142m`.

    Raises:
        UserError: timm has no such network, or no such weights of it.
    """
    import timm
    from timm.data import resolve_data_config

    arch, dot, tag = name.partition(".")
    if not timm.is_model(arch):
        near = nearest_name(name, [*timm.list_models(), *timm.list_models(pretrained=True)])
        near = near.replace("mean ", f"mean {TIMM}")
        raise UserError(f"--arch {TIMM}{shown(name)} is unknown{near}: give a name of timm.list_models()")
    tags = [known.partition(".")[2] for known in timm.list_models(f"{arch}.*", pretrained=True)]
    if dot and tag not in tags:
        listed = f": it has {', '.join(tags)}" if tags else ": it has none"
        raise UserError(
            f"--arch {TIMM}{shown(name)}: timm has no weights of that tag for {arch}{nearest_name(tag, tags)}{listed}"
        )
    published = timm.get_pretrained_cfg(name)
    wanted = resolve_data_config(pretrained_cfg=published.to_dict() if published else {})
    size = wanted["input_size"][-1]
    return Arch(
        partial(build_timm, name),
        crop_size=size,
        resize=max(size, int(size / wanted["crop_pct"])),
        mean=wanted["mean"],
        std=wanted["std"],
        has_weights=bool(tags),
        interpolation="bilinear" if wanted["interpolation"] == "bilinear" else "bicubic",
        is_sized=True,
    )


def build_timm(name: str, weights: Weights, crop_size: int) -> tuple[nn.Module, int]:
    """A network of timm without its classifier, and its number of features.

    Args:
        name: as in `find_timm`.
        weights: which weights it gets.
        crop_size: side of its input, px, which a network of a fixed size is built for.

    Raises:
        OSError: its weights can't be downloaded.
        UserError: it can't be built for that size.
    """
    import timm

    published = timm.get_pretrained_cfg(name)
    size: dict[str, Any] = {}
    if published and published.fixed_input_size and published.input_size[1:] != (crop_size, crop_size):
        size = {"img_size": crop_size}
    try:
        network: Any = timm.create_model(name, pretrained=weights.are_downloaded, num_classes=0, **size)
    except Exception as error:
        origin = type(error).__module__.split(".")[0]
        if weights.are_downloaded and origin in ("huggingface_hub", "httpx", "safetensors"):
            raise OSError(str(error) or origin) from error
        if size and not isinstance(error, OSError):
            raise _refused_size(f"{TIMM}{name}", crop_size, error) from None
        raise
    return network, getattr(network, "head_hidden_size", None) or network.num_features


# Pooling


class GlobalPool(nn.Module):
    """Pools the positions of maps or tokens to one vector.

    Args:
        kind: one of `POOLINGS` other than cls. avg+max is the sum of both; gem is the generalized mean, `(mean
            x^p)^(1/p)` of x cut off at 1e-6, whose exponent p learns.
        dims: the dimensions of positions.
        keepdim: whether they stay, with size 1.
    """

    def __init__(self, kind: str, dims: Sequence[int] = (2, 3), keepdim: bool = False):
        super().__init__()
        self.kind, self.dims, self.keepdim = kind, tuple(dims), keepdim
        if kind == "gem":
            self.p = nn.Parameter(torch.tensor(3.0))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Maps such as `(B, C, H, W)` to `(B, C)`, or `(B, C, 1, 1)` with `keepdim`."""
        if self.kind == "gem":
            return features.clamp(min=1e-6).pow(self.p).mean(self.dims, self.keepdim).pow(1 / self.p)
        if self.kind == "max":
            return features.amax(self.dims, self.keepdim)
        mean = features.mean(self.dims, self.keepdim)
        return mean if self.kind == "avg" else mean + features.amax(self.dims, self.keepdim)

    def extra_repr(self) -> str:
        return f"{self.kind}, dims={self.dims}"


class TokenPool(nn.Module):
    """A transformer whose patch tokens are pooled, or of which the class token is taken.

    Args:
        network: torchvision's or timm's.
        kind: one of `POOLINGS`.
        num_prefix_tokens: how many tokens that are not patches stand before them, the class token first.
    """

    def __init__(self, network: nn.Module, kind: str, num_prefix_tokens: int):
        super().__init__()
        self.network, self.num_prefix_tokens = network, num_prefix_tokens
        self.pool = None if kind == "cls" else GlobalPool(kind, dims=(1,))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalized images `(B, 3, H, W)` to features `(B, C)`."""
        if hasattr(self.network, "forward_features"):
            tokens = self.network.forward_features(images)  # type: ignore[operator]  # (B, N, C)
        else:
            tokens = tap(self.network, ["encoder"], images)[0]  # (B, N, C)
        pooled = tokens[:, 0] if self.pool is None else self.pool(tokens[:, self.num_prefix_tokens :])
        return getattr(self.network, "fc_norm", nn.Identity())(pooled)


def tap(network: nn.Module, names: Sequence[str], images: torch.Tensor) -> list[torch.Tensor]:
    """What modules of a network give for normalized images `(B, 3, H, W)`, by their names."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        outputs[name] = output

    hooks = [network.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [outputs[name] for name in names]


def set_pooling(network: nn.Module, kind: str, arch: str) -> nn.Module:
    """Gives a network another global pooling; the names of its parameters stay, or begin with `network.`.

    Args:
        network: a backbone; it is changed.
        kind: one of `POOLINGS`.
        arch: its name, for messages.

    Returns:
        The network, or a `TokenPool` around it.

    Raises:
        UserError: it has nothing to pool so.
    """
    num_prefix_tokens = _num_prefix_tokens(network)
    if num_prefix_tokens is not None:
        if kind == "cls" and not _has_class_token(network):
            raise UserError(f"--pooling cls: --arch {arch} has no class token; it offers avg, max, avg+max and gem")
        return TokenPool(network, kind, num_prefix_tokens)
    place = _find_pooling(network)
    if place is None:
        raise UserError(f"--pooling {kind}: --arch {arch} offers none, since it has no last map or tokens; drop it")
    if kind == "cls":
        raise UserError(f"--pooling cls: --arch {arch} has no class token; it offers avg, max, avg+max and gem")
    name, dims, keepdim = place
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, GlobalPool(kind, dims, keepdim))
    return network


def _num_prefix_tokens(network: nn.Module) -> int | None:
    """How many tokens of a vision transformer are not patches; None for another network."""
    if type(network).__name__ == "VisionTransformer" and hasattr(network, "encoder"):
        return 1  # torchvision's
    return getattr(network, "num_prefix_tokens", None)


def _has_class_token(network: nn.Module) -> bool:
    return getattr(network, "class_token", getattr(network, "cls_token", None)) is not None


def _find_pooling(network: nn.Module) -> tuple[str, tuple[int, ...], bool] | None:
    """The name of the module that pools the last map, the dimensions of positions, and whether they stay."""
    if type(network).__name__ in FUNCTIONAL_POOLING:
        name, is_before_relu = FUNCTIONAL_POOLING[type(network).__name__]
        layers = network.get_submodule(name)
        assert isinstance(layers, nn.Sequential)
        for more in [*([nn.ReLU()] if is_before_relu else []), nn.Identity()]:
            layers.append(more)
        return f"{name}.{len(layers) - 1}", (2, 3), True
    return _find_pooling_module(network)


def _find_pooling_module(network: nn.Module) -> tuple[str, tuple[int, ...], bool] | None:
    """What `_find_pooling` finds, without changing networks that pool in a function: of these it finds nothing."""
    found = None
    for name, module in network.named_modules():
        is_gate = type(network.get_submodule(name.rpartition(".")[0])).__name__ == "SqueezeExcitation"
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)) and not is_gate:
            found = name, (2, 3), True
        elif isinstance(module, GlobalPool):
            return name, module.dims, module.keepdim
        elif type(module).__name__ == "SelectAdaptivePool2d":  # timm's
            pooled = module(torch.zeros(1, 4, 5, 6))
            if pooled.shape in ((1, 4), (1, 4, 1, 1)):
                return name, (2, 3), pooled.ndim == 4
            if pooled.shape in ((1, 6), (1, 1, 1, 6)):
                return name, (1, 2), pooled.ndim == 4
    return found


# What doesn't learn, and adapters


def freeze_layers(backbone: nn.Module, patterns: Sequence[str], arch: str) -> list[nn.Module]:
    """Freezes the parameters whose names begin as one of the regular expressions says.

    Returns:
        The BatchNorm layers among them, whose statistics are to stay.

    Raises:
        UserError: an expression matches nothing.
    """
    names = [name for name, _ in backbone.named_parameters()]
    for expression in patterns:
        if not any(re.match(expression, name) for name in names):
            listed = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in names[:: max(1, len(names) // 5)]))
            raise UserError(
                f"--freeze_layers {expression} matches no parameter of --arch {arch}, whose names begin with, for "
                f"example, {listed}"
            )
    matched = [name for name in names if any(re.match(expression, name) for expression in patterns)]
    for name in matched:
        backbone.get_parameter(name).requires_grad_(False)
    owners = dict.fromkeys(name.rpartition(".")[0] for name in matched)
    return [module for module in map(backbone.get_submodule, owners) if isinstance(module, _BatchNorm)]


def add_lora(backbone: nn.Module, rank: int, arch: str, crop_size: int) -> list[nn.Module]:
    """Puts low-rank adapters into a backbone's attention and MLP blocks, and freezes all its other parameters.

    The scale of what they add, alpha / rank, is 1. Hu et al., ICLR 2022.

    Returns:
        The BatchNorm layers, whose statistics are to stay.

    Raises:
        UserError: it has no such blocks.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = [
        name
        for name in _called_modules(backbone, arch, crop_size)
        if isinstance(module := backbone.get_submodule(name), nn.Linear | nn.MultiheadAttention)
        and (set(name.split(".")[:-1]) & {*LORA_PARENTS} or isinstance(module, nn.MultiheadAttention))
    ]
    if not targets:
        raise UserError(
            f"--lora: --arch {arch} has no Linear layers inside modules called {', '.join(LORA_PARENTS)}, which "
            "adapters are for: choose a transformer, or drop it"
        )
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), backbone)
    return [module for module in backbone.modules() if isinstance(module, _BatchNorm)]


def lora_state(net: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' parameters under the names that `peft.set_peft_model_state_dict(net.backbone, …)` takes."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(net.get_submodule("backbone"))


def _called_modules(backbone: nn.Module, arch: str, crop_size: int) -> list[str]:
    """The names of the modules that a forward pass calls: others' weights may be used by a function instead."""
    called = []
    names = {module: name for name, module in backbone.named_modules()}
    hooks = [module.register_forward_pre_hook(lambda module, _: called.append(names[module])) for module in names]
    _try_backbone(backbone, arch, crop_size)
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(called))


def _try_backbone(backbone: nn.Module, arch: str, crop_size: int, names: Sequence[str] = ()) -> list[torch.Tensor]:
    """What modules of a backbone, in evaluation mode, give for one gray image.

    Raises:
        UserError: it can't take images of that size.
    """
    device = next(iter(backbone.parameters()), torch.empty(0)).device
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.inference_mode():
            return tap(backbone, names, torch.zeros(1, 3, crop_size, crop_size, device=device))
    except SIZE_ERRORS as error:
        raise _refused_size(arch, crop_size, error) from None
    finally:
        backbone.train(was_training)


def _refused_size(arch: str, crop_size: int, error: Exception) -> UserError:
    """What to say of a network that can't take images of a size."""
    fitting = find_arch(arch).crop_size
    return UserError(f"--arch {arch} can't take images of --crop_size {crop_size} ({error}): try {fitting}")


# Several depths

# Ends of three stages by the names of their modules; the first of which a network has all is its default.
STAGES = (
    ("layer2", "layer3", "layer4"),
    ("inception3b", "inception4e", "inception5b"),
    ("stage2", "stage3", "stage4"),
    ("features.denseblock2", "features.denseblock3", "features.denseblock4"),
    ("trunk_output.block2", "trunk_output.block3", "trunk_output.block4"),
    ("stages.1", "stages.2", "stages.3"),
    ("features.3", "features.5", "features.7"),
)


LAST_LAYERS = ("encoder.ln", "norm", "bn2")  # after the last block, before the network's own pooling


class CascadeBackbone(nn.Module):
    """A backbone that gives the pooled outputs of several of its modules, one after the other.

    Args:
        network: normalized images `(B, 3, H, W)` to anything.
        layers: names of its modules; their outputs are maps, tokens or vectors.
        arch: the network's name, for messages.
        crop_size: side of the images, px.
        pooling: one of `POOLINGS` other than cls.

    Attributes:
        widths: number of features of each.

    Raises:
        UserError: the network has no such module, or its output can't be pooled.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], arch: str, crop_size: int, pooling: str = "avg"):
        super().__init__()
        self.network, self.layers = network, list(layers) or default_stages(network, arch)
        names = [name for name, _ in network.named_modules()]
        for name in self.layers:
            if name not in names:
                raise UserError(f"--cascade_layers {name}: --arch {arch} has no such module{nearest_name(name, names)}")
        self.widths, pools = [], []
        for name, output in zip(self.layers, _try_backbone(network, arch, crop_size, self.layers)):
            width, dims = _positions(output, name)
            self.widths.append(width)
            pools.append(GlobalPool(pooling, dims) if dims else nn.Identity())
        self.pools = nn.ModuleList(pools)

    def extra_repr(self) -> str:
        return f"layers={self.layers}"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalized images `(B, 3, H, W)` to features `(B, sum of widths)`."""
        outputs = tap(self.network, self.layers, images)
        return torch.cat([pool(output) for pool, output in zip(self.pools, outputs)], dim=1)


def _positions(output: Any, name: str) -> tuple[int, tuple[int, ...]]:
    """The number of features in a module's output for one square image, and the dimensions of their positions."""
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else ()
    if len(shape) == 4:
        is_channels_last = shape[1] == shape[2] != shape[3]
        return (shape[3], (1, 2)) if is_channels_last else (shape[1], (2, 3))
    if len(shape) in (2, 3):
        return shape[-1], (1,) * (len(shape) == 3)
    raise UserError(f"--cascade_layers {name}: its output is not a map, tokens or a vector, so name another module")


def default_stages(network: nn.Module, arch: str) -> list[str]:
    """The names of three modules of a network at different depths, the last one at its end.

    Raises:
        UserError: there is no default for it.
    """
    modules = dict(network.named_modules())
    names = {name for name, module in modules.items() if [*module.children()]}
    for stages in STAGES:
        if names.issuperset(stages):
            return list(stages)
    blocks = [name for name in names if re.fullmatch(r"blocks\.\d+|encoder\.layers\.encoder_layer_\d+", name)]
    if len(blocks) >= 3:  # of a transformer, or another sequence of blocks
        blocks.sort(key=lambda name: int(re.findall(r"\d+", name)[-1]))
        depths = [blocks[math.ceil(len(blocks) * third / 3) - 1] for third in (1, 2, 3)]
        ends = [name for name in LAST_LAYERS if name in modules]
        return [*depths[:2], *(ends[:1] or depths[2:])]
    raise UserError(
        f"--arch {arch} has no modules of which it is known that they end its stages: name some with --cascade_layers, "
        f"for example of {', '.join(name for name, _ in network.named_children())}"
    )


class CascadeEmbedding(nn.Module):
    """An embedding for each depth, of length 1, one after the other.

    Args:
        heads: features of one depth `(B, width)` to embeddings.
        widths: their numbers of features.
    """

    def __init__(self, heads: Sequence[nn.Module], widths: Sequence[int]):
        super().__init__()
        self.heads, self.widths = nn.ModuleList(heads), list(widths)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(B, sum of widths)` to embeddings `(B, D)`."""
        return torch.cat(self.stages(features), dim=1)

    def stages(self, features: torch.Tensor) -> list[torch.Tensor]:
        """Features `(B, sum of widths)` to the embeddings of each depth."""
        parts = features.split(self.widths, dim=1)
        return [F.normalize(head(part), dim=1) for head, part in zip(self.heads, parts)]


# The embedding network


def mlp(features: int, *widths: int) -> nn.Sequential:
    """Linear layers of these widths, with a ReLU between them.

    Raises:
        UserError: this machine doesn't have the memory for them.
    """
    layers: list[nn.Module] = []
    for width in widths:
        # weights, gradient, Adam's moments
        check_memory(16.0 * features * width, f"a layer of {features} by {width} features")
        layers += [nn.Linear(features, width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers[:-1])


def build_embedding(num_features: int, embed_dim: int, hidden: Sequence[int] = (), norm: str = "none") -> nn.Module:
    """Builds what makes embeddings `(B, D)` of features `(B, features)`.

    Args:
        num_features: number of features.
        embed_dim: dimension D; 0: no linear layer, the features are the embedding.
        hidden: widths of hidden layers.
        norm: one of `EMBEDDER_NORMS`.

    Raises:
        UserError: this machine doesn't have the memory for it.
    """
    layers = [*mlp(num_features, *hidden, embed_dim)] if embed_dim else []
    if norm == "layernorm":
        layers = [nn.LayerNorm(num_features, elementwise_affine=False), *layers]
    if len(layers) == 1:  # so that an ordinary network's parameters are embedding.weight and embedding.bias
        return layers[0]
    return nn.Sequential(*layers) if layers else nn.Identity()


class EmbeddingNet(nn.Module):
    """A backbone and an embedding of its features.

    Args:
        backbone: normalized images `(B, 3, H, W)` to features `(B, features)`.
        num_features: number of features.
        embed_dim: dimension D of the embedding; 0: as many as there are features.
        normalize: whether embeddings are scaled to unit length.
        freeze_batchnorm: whether BatchNorm layers keep their running statistics in training.
        mean, std: of the backbone's input, per channel, for images in 0 … 1.
        freeze_trunk: whether the backbone stays as it is: in evaluation mode, without gradients.
        embedding: features `(B, features)` to embeddings `(B, D)`, see `build_embedding` (default: a linear layer).
        still: modules of the backbone that stay in evaluation mode.
        precision: a key of `PRECISIONS`, of the backbone's arithmetic; the embedding is computed in float32.
        channels_last: whether the backbone's weights and images have the channels of a pixel side by side.
        chunk: number of images whose activations are in memory at once while it learns (default: the whole batch).

    Attributes:
        takes_features: whether it is given features that the backbone has computed before, in place of images.
        compiles: whether the backbone is compiled when it is first run.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_features: int,
        embed_dim: int = 128,
        normalize: bool = True,
        freeze_batchnorm: bool = False,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        freeze_trunk: bool = False,
        embedding: nn.Module | None = None,
        still: Sequence[nn.Module] = (),
        precision: str = "fp32",
        channels_last: bool = False,
        chunk: int | None = None,
    ):
        super().__init__()
        self.backbone = backbone.requires_grad_(False) if freeze_trunk else backbone
        self.precision, self.memory_format, self.chunk = precision, torch.contiguous_format, chunk
        if channels_last:
            self.memory_format = torch.channels_last
            backbone.to(memory_format=torch.channels_last)
        self.compiles = False
        self._compiled: list[Callable[..., torch.Tensor]] = []  # hidden from the modules, or it would be saved as one
        self.embedding = embedding or build_embedding(num_features, embed_dim)
        self.num_features, self.embed_dim = num_features, embed_dim or num_features
        self.normalize = normalize
        self.freeze_batchnorm, self.freeze_trunk, self.still = freeze_batchnorm, freeze_trunk, list(still)
        self.takes_features = False
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` uint8 to embeddings `(B, D)`.

        Raises:
            UserError: it got something else.
        """
        return self.embed_features(self.features(images))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` uint8 to the backbone's features `(B, features)`.

        Raises:
            UserError: it got something else.
        """
        if self.takes_features:
            return images
        check_images(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_trunk):
            if self.chunk is None or len(images) <= self.chunk or not torch.is_grad_enabled():
                return self._features(images)
            once_more = partial(checkpoint, self._features, use_reentrant=False, context_fn=self._recomputing)
            return torch.cat([once_more(chunk) for chunk in images.split(self.chunk)])

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        pixels = (images.contiguous(memory_format=self.memory_format) - self.mean) / self.std
        if self.precision == "fp32":
            return self._run_backbone(pixels)
        with torch.autocast(images.device.type, PRECISIONS[self.precision]):
            return self._run_backbone(pixels).float()

    def _recomputing(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """What is around the first run of a chunk, and around the second, which must not count in BatchNorm again."""
        return nullcontext(), keep_statistics(self.backbone)

    def _run_backbone(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalized images `(B, 3, H, W)` to features, by the compiled backbone where that is wanted and works."""
        if not self.compiles:
            return self.backbone(pixels)
        if not self._compiled:
            self._compiled.append(torch.compile(self.backbone))
        try:
            return self._compiled[0](pixels)
        except Exception as error:  # torch.compile raises anything at all
            self.compiles = False
            notice(f"--compile does not work here, the run goes on without it ({reason(error)})")
            return self.backbone(pixels)

    def embed_features(self, features: torch.Tensor) -> torch.Tensor:
        """The backbone's features `(B, features)` to embeddings `(B, D)`."""
        embeddings = self.embedding(features)
        return F.normalize(embeddings, dim=1) if self.normalize else embeddings

    @property
    def last_linear(self) -> nn.Linear:
        """The last linear layer of the embedding, which must have one."""
        return [layer for layer in self.embedding.modules() if isinstance(layer, nn.Linear)][-1]

    def train(self, mode: bool = True) -> EmbeddingNet:
        """Sets the mode; a frozen backbone and frozen BatchNorm layers stay in evaluation mode."""
        super().train(mode)
        for module in [self.backbone] if self.freeze_trunk else self.still:
            module.eval()
        if self.freeze_batchnorm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, freeze_batchnorm={self.freeze_batchnorm}, freeze_trunk={self.freeze_trunk}"

    def parameter_groups(self, lr: float, decay: float, fc_lr_mul: float = 0) -> list[dict[str, Any]]:
        """The optimizer's groups of the parameters that learn: `network`, or `backbone` and `embedding`.

        They are two with a learning rate of the embedding layer of its own, `lr * fc_lr_mul`; a backbone of which
        nothing learns has no group.
        """

        def group(name: str, module: nn.Module, rate: float) -> dict[str, Any]:
            learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
            return {"name": name, "params": learning, "lr": rate, "weight_decay": decay}

        backbone, embedding = (
            group("backbone", self.backbone, lr),
            group("embedding", self.embedding, lr * (fc_lr_mul or 1)),
        )
        if not backbone["params"]:
            return [embedding]
        return [backbone, embedding] if fc_lr_mul else [group("network", self, lr)]


@contextmanager
def keep_statistics(network: nn.Module) -> Iterator[None]:
    """Inside the block, BatchNorm layers normalize as before, but don't update their running statistics."""
    layers = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum


class Trunk(nn.Module):
    """An embedding network without its embedding layer: images `(B, 3, H, W)` uint8 to features `(B, features)`.

    They are scaled to length 1 where the network's embeddings are.
    """

    def __init__(self, net: EmbeddingNet):
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.net.features(images)
        return F.normalize(features, dim=1) if self.net.normalize else features


# Where a similarity comes from


@dataclass(frozen=True)
class LastMap:
    """Where a backbone has its last positions, before it pools them.

    Attributes:
        module: the name of the module that takes them, or gives them.
        is_input: whether it takes them.
        dims: their dimensions, such as (2, 3) of `(B, C, H, W)`, or (1,) of tokens `(B, N, C)`.
        num_prefix_tokens: how many tokens that are not positions stand before them.
    """

    module: str
    is_input: bool
    dims: tuple[int, ...]
    num_prefix_tokens: int = 0

    def cut(self, backbone: nn.Module, leaves: list[torch.Tensor]) -> list[RemovableHandle]:
        """Makes the next forward pass, which runs without gradients, compute them from here on.

        Args:
            backbone: the backbone.
            leaves: gets the tensor of positions, whose gradient can be asked for.

        Returns:
            Handles that undo it.
        """

        def begin(positions: torch.Tensor) -> torch.Tensor:
            torch.set_grad_enabled(True)  # until the block ends that turned them off
            leaves.append(positions.detach().float().requires_grad_())
            return leaves[-1].clone()  # some networks go on in place, after the pooling too

        module = backbone.get_submodule(self.module)
        if not self.is_input:
            return [module.register_forward_hook(lambda _, inputs, output: begin(output))]
        before = module.register_forward_pre_hook(lambda _, inputs: (begin(inputs[0]), *inputs[1:]))
        return [before, module.register_forward_hook(lambda _, inputs, output: output.clone())]

    def positions(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's positions, with their features last: `(B, P, C)`."""
        if len(self.dims) == 1:
            return tensor[:, self.num_prefix_tokens :]
        features_last = tensor if self.dims == (1, 2) else tensor.permute(0, 2, 3, 1)
        return features_last.flatten(1, 2)


def find_last_map(backbone: nn.Module) -> LastMap | None:
    """Where a backbone has the map or the tokens that it pools; None where it has neither."""
    inner: Any = backbone.network if isinstance(backbone, TokenPool) else backbone
    if isinstance(backbone, CascadeBackbone):
        return None
    num_prefix_tokens = _num_prefix_tokens(inner)
    if num_prefix_tokens is not None:
        name = next((name for name in ("encoder", "norm") if isinstance(getattr(inner, name, None), nn.Module)), None)
        prefix = "network." if isinstance(backbone, TokenPool) else ""
        return None if name is None else LastMap(f"{prefix}{name}", False, (1,), num_prefix_tokens)
    if (place := _find_pooling_module(backbone)) is not None:
        return LastMap(place[0], True, place[1])
    name, _ = FUNCTIONAL_POOLING.get(type(backbone).__name__, (None, False))
    return None if name is None else LastMap(name, False, (2, 3))


@dataclass(frozen=True)
class SimilarityMaps:
    """Where the similarities of a query and K other images come from.

    Attributes:
        similarities: `(K,)` cosine similarities.
        of_query: `(K, h, w)` what each position of the query adds to each: a map's sum is the similarity.
        of_others: `(K, h, w)` what each position of the other image adds.
        is_of_embedding: whether they are similarities of embeddings; else those of the mean of the last tokens, since
            the network makes its embedding of the class token alone.
    """

    similarities: torch.Tensor
    of_query: torch.Tensor
    of_others: torch.Tensor
    is_of_embedding: bool = True


def similarity_maps(net: EmbeddingNet | Trunk, images: torch.Tensor) -> SimilarityMaps:
    """Decomposes the similarities of the first image and the others over the positions of the network's last map.

    Where features are averaged and embedded by a linear layer, a position adds the dot product of its own embedding and
    the other image's (Stylianou, Souvenir, Pless, WACV 2019). This is the gradient times the positions' features, plus
    an equal share of the bias, and so it is computed; it holds for max and gem pooling and for ReLUs in the embedding,
    too. Layer normalization counts as a scaling by a constant (Ali et al., ICML 2022).

    Args:
        net: the network, whose backbone has a last map; it stays as it is.
        images: `(1 + K, 3, H, W)` uint8, the query first, on the network's device.
    """
    bare, was_training = net.net if isinstance(net, Trunk) else net, net.training
    place = find_last_map(bare.backbone)
    assert place is not None, "the backbone has no last map"
    leaves: list[torch.Tensor] = []
    norms = [module for module in net.modules() if isinstance(module, nn.LayerNorm)]
    hooks = [norm.register_forward_hook(_keep_scale) for norm in norms] + place.cut(bare.backbone, leaves)
    net.eval()
    try:
        with torch.no_grad():
            features = bare.backbone((images - bare.mean) / bare.std)
            embeddings = features if isinstance(net, Trunk) else bare.embedding(features)  # (1 + K, D)
    finally:
        for hook in hooks:
            hook.remove()
        net.train(was_training)
    maps = _decompose(embeddings, leaves[-1], place)
    if maps is None:
        with torch.enable_grad():
            maps = _decompose(place.positions(leaves[-1]).mean(1), leaves[-1], place, is_of_embedding=False)
    assert maps is not None
    return maps


def _keep_scale(norm: nn.LayerNorm, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
    """A layer normalization's output, whose gradient takes its standard deviation for a constant."""
    if not torch.is_grad_enabled():
        return None
    dim = next(dim for dim in (-1, 1) if inputs[0].shape[dim] == norm.normalized_shape[-1])  # 1 of maps
    centered = inputs[0] - inputs[0].mean(dim, keepdim=True)
    scale = (centered.square().mean(dim, keepdim=True) + norm.eps).sqrt().detach()
    added = centered / scale
    if norm.weight is not None:
        added = (added.transpose(dim, -1) * norm.weight).transpose(dim, -1)
    return output.detach() + added - added.detach()


def _decompose(
    embeddings: torch.Tensor, leaf: torch.Tensor, place: LastMap, is_of_embedding: bool = True
) -> SimilarityMaps | None:
    """The maps of embeddings `(1 + K, D)` over the positions that they were computed from; None where they weren't."""
    units = embeddings / embeddings.detach().norm(dim=1, keepdim=True).clamp(min=1e-12)
    fixed = units.detach()
    similarities = fixed[1:] @ fixed[0]  # (K,)

    def spread(similarity: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(similarity, leaf, retain_graph=True)
        return (place.positions(gradient) * place.positions(leaf.detach())).sum(2)  # (1 + K, P)

    others = spread((units[1:] @ fixed[0]).sum())[1:]  # (K, P)
    query = torch.stack([spread(units[0] @ other)[0] for other in fixed[1:]])  # (K, P)
    if place.num_prefix_tokens and not (others.any() or query.any()):
        return None
    size = leaf.shape[place.dims[0]], leaf.shape[place.dims[-1]]
    if len(place.dims) == 1:
        count, side = others.shape[1], math.isqrt(others.shape[1])
        size = (side, side) if side**2 == count else (1, count)

    def complete(parts: torch.Tensor) -> torch.Tensor:
        rest = (similarities - parts.sum(1)) / parts.shape[1]  # (K,) what depends on no position, in equal shares
        return (parts + rest[:, None]).view(-1, *size)

    return SimilarityMaps(similarities, complete(query), complete(others), is_of_embedding)


def networkselect(opt: argparse.Namespace | Mapping[str, Any], load_pretrained: bool | None = None) -> EmbeddingNet:
    """Builds the network of the resolved flags.

    Args:
        opt: the resolved flags, or the dict that a run keeps of them in hypa.pkl.
        load_pretrained: whether to load pretrained weights (default: for flags, yes; for a run's dict, whose weights
            are in its checkpoint, no). The network, its input transform included, is the same either way.

    Returns:
        The network: in training mode for flags, in evaluation mode for a run's dict.

    Raises:
        UserError: the architecture is unknown or can't be used, or its weights can't be downloaded, read, or don't fit.
    """
    is_finished = isinstance(opt, Mapping)
    if load_pretrained is None:
        load_pretrained = not is_finished
    opt = with_defaults(opt)
    arch = find_arch(opt.arch)
    backbone, features = build_backbone(opt, arch, load_pretrained)
    still = freeze_layers(backbone, opt.freeze_layers, opt.arch) if opt.freeze_layers else []
    if opt.pooling and opt.cascade_layers is None:
        backbone = set_pooling(backbone, opt.pooling, opt.arch)
    if opt.lora:
        still = add_lora(backbone, opt.lora, opt.arch, opt.crop_size)
    if opt.cascade_layers is not None:
        backbone = CascadeBackbone(backbone, opt.cascade_layers, opt.arch, opt.crop_size, opt.pooling or "avg")
        features = sum(backbone.widths)
    if opt.attention and find_last_map(backbone) is None:
        what = "a cascade pools several" if opt.cascade_layers is not None else f"--arch {opt.arch} has none"
        raise UserError(f"--attention shows the positions of a network's last map or tokens, and {what}: drop it")
    check_memory(16.0 * features * opt.embed_dim, f"--embed_dim {opt.embed_dim}")  # weights, gradient, Adam's moments
    embedding = select_embedding(opt, backbone, features)
    net = EmbeddingNet(
        backbone,
        features,
        opt.embed_dim,
        opt.normalize,
        opt.freeze_batchnorm,
        arch.mean,
        arch.std,
        opt.freeze_trunk,
        embedding,
        still,
        opt.precision or "fp32",
        bool(opt.channels_last),
        opt.grad_cache,
    )
    check_input(net, opt.arch, opt.crop_size)
    net.compiles = bool(opt.compile)
    return net.eval() if is_finished else net


def select_embedding(opt: argparse.Namespace, backbone: nn.Module, num_features: int) -> nn.Module:
    """The embedding of the resolved flags, with a head for each depth of a cascade.

    Raises:
        UserError: --embed_dim can't be divided among them.
    """
    if not isinstance(backbone, CascadeBackbone):
        return build_embedding(num_features, opt.embed_dim, opt.embedder, opt.embedder_norm)
    share, rest = divmod(opt.embed_dim, len(backbone.widths))
    if rest or (opt.embed_dim and not share):
        near = max(1, round(opt.embed_dim / len(backbone.widths))) * len(backbone.widths)
        raise UserError(
            f"--embed_dim {opt.embed_dim} can't be divided among the {len(backbone.widths)} heads of a cascade: give "
            f"--embed_dim {near}"
        )
    heads = [build_embedding(width, share, opt.embedder, opt.embedder_norm) for width in backbone.widths]
    return CascadeEmbedding(heads, backbone.widths)


def build_backbone(opt: argparse.Namespace, arch: Arch, load_pretrained: bool) -> tuple[nn.Module, int]:
    """The backbone of the resolved flags, with its weights, and its number of features.

    Raises:
        UserError: it can't be used, or its weights can't be downloaded, read, or don't fit.
    """
    file = opt.weights if load_pretrained else None
    if opt.not_pretrained:
        weights = Weights.RANDOM
    else:
        weights = Weights.DOWNLOADED if load_pretrained and file is None else Weights.LOADED_LATER
    if weights.are_downloaded and not arch.has_weights:
        raise UserError(f"--arch {opt.arch} has no pretrained weights: drop --pretrained, or give --weights FILE")
    try:
        with first_rank_first() if weights.are_downloaded else nullcontext():
            backbone, features = arch.build(weights, *([opt.crop_size] if arch.is_sized else []))
    except (OSError, RuntimeError, EOFError, HTTPException, UnpicklingError) as error:
        if not weights.are_downloaded:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"pretrained weights of {opt.arch} can't be downloaded ({reason}): give them as --weights FILE, or train "
            "from scratch with --not_pretrained"
        ) from None
    if file is not None:
        load_weights(backbone, file)
    return backbone, features


def with_defaults(opt: argparse.Namespace | Mapping[str, Any]) -> argparse.Namespace:
    """The flags, with the defaults of those of the network that they lack, as the flags of an earlier version do."""
    parser = FlagParser()
    add_arguments(parser)
    return argparse.Namespace(**{**vars(parser.parse_args([])), **(opt if isinstance(opt, Mapping) else vars(opt))})


def refuse_contradictions(opt: argparse.Namespace) -> None:
    """Checks the resolved flags of the network against each other.

    Raises:
        UserError: they contradict each other.
    """
    frozen = [name for name in ("freeze_trunk", "freeze_layers", "lora") if getattr(opt, name)]
    if len(frozen) > 1:
        raise UserError(
            f"--{frozen[0]} and --{frozen[1]} contradict each other, since either says which part of the backbone "
            "learns: drop one"
        )
    if opt.attention and not opt.pictures and opt.evaluate is None:
        raise UserError("--attention belongs to the pictures of retrievals, which --no-pictures leaves out: drop one")
    device = find_device(opt.gpu)
    if opt.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UserError("--precision bf16: this GPU does not compute in bfloat16; give fp16 or fp32")
    if opt.precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 takes a CPU twenty times as long as fp32: give bf16 or fp32")
    if opt.grad_cache is not None and opt.grad_cache >= opt.bs:
        raise UserError(
            f"--grad_cache {opt.grad_cache} doesn't split batches of --bs {opt.bs}: give less than that, or drop it"
        )
    if opt.cascade_layers is not None and opt.pooling == "cls":
        raise UserError("--pooling cls takes one token, and a cascade pools maps and tokens of several depths: drop it")
    if opt.embedder and not opt.embed_dim:
        raise UserError(
            "--embedder puts hidden layers before the embedding layer, which --embed_dim 0 leaves out: drop one of them"
        )
    if opt.grad_measure and not opt.embed_dim:
        raise UserError("--grad_measure is of the embedding layer, which --embed_dim 0 leaves out: drop one of them")


def check_images(images: Any) -> None:
    """Refuses anything but images `(B, 3, H, W)` uint8; looks at no pixel, so that no device is waited for.

    Raises:
        UserError: it is something else.
    """
    got = type(images).__name__
    if isinstance(images, torch.Tensor):
        if images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3:
            return
        got = f"{tuple(images.shape)} {str(images.dtype).removeprefix('torch.')}"
    raise UserError(f"the network takes images as (B, 3, H, W) uint8, and normalizes them itself; it got {got}")


def load_weights(backbone: nn.Module, file: str) -> None:
    """Loads a backbone's state dict: torchvision's or timm's, without its classifier, or that of a run's checkpoint.

    Raises:
        UserError: the file can't be read, its entries don't match the backbone's, or they aren't finite numbers.
    """
    own = backbone.state_dict()
    state = read_state_dict(file, own)
    if type(backbone).__module__.startswith("timm.") and any(
        name not in state or state[name].shape != value.shape for name, value in own.items()
    ):
        state = _convert_for_timm(backbone, state, file)
    # torchvision renames the entries of its DenseNets' files when it loads them
    state = {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", name): state[name] for name in state}
    removed = {path for path, module in backbone.named_modules() if isinstance(module, nn.Identity)}
    removed |= {"aux1", "aux2", "AuxLogits"}  # auxiliary classifiers of GoogLeNet and Inception
    classifiers = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()  # of timm's networks
    removed |= {classifiers} if isinstance(classifiers, str) else set(classifiers)
    surplus = [name for name in state if name not in own and not any(name.startswith(f"{path}.") for path in removed)]
    for name in own:  # state dicts from before PyTorch 0.4.1 lack them
        if name.endswith(".num_batches_tracked"):
            state.setdefault(name, own[name])
    state = {name: state[name] for name in [*own, *surplus] if name in state}
    for name, value in own.items():
        if name in state and (kind := _unusual_kind(state[name], value)) is not None:
            raise UserError(f"--weights {file}: {name} is {kind}, which can't be loaded: save it as ordinary float32")
    problems = {
        "lacks": [name for name in own if name not in state],
        "has another shape for": [name for name in own if name in state and state[name].shape != own[name].shape],
        "has the surplus entry": surplus,
    }
    for problem, names in problems.items():
        if names:
            raise UserError(f"--weights {file} {problem} {_first_of(names)}: it belongs to another --arch")
    state = {name: state[name].to(own[name].dtype) for name in own}
    not_finite = [name for name in own if not state[name].isfinite().all()]
    if not_finite:
        raise UserError(
            f"--weights {file} has NaN or infinite values in {_first_of(not_finite)}: take the weights of an earlier "
            "epoch, or others"
        )
    backbone.load_state_dict(state)


def _convert_for_timm(backbone: nn.Module, state: dict[str, torch.Tensor], file: str) -> dict[str, torch.Tensor]:
    """A state dict as timm converts it on loading: from its authors' names, and position embeddings to another size."""
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        return dict(convert(dict(state), backbone))
    except Exception as error:  # it raises anything at all on the state of something else
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--weights {file} can't be converted ({reason}): it belongs to another --arch") from None


def read_state_dict(file: str, own: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Reads a state dict, without what training programs put around it or before its names.

    Args:
        file: what `torch.save` wrote, or a .safetensors file.
        own: the entries that are looked for.

    Raises:
        UserError: it can't be read, or is not a state dict.
    """
    state: Any = _load_safetensors(file) if file.endswith(".safetensors") else load_checkpoint(file)
    for _ in WRAPPERS:  # they may stand in one another
        inner = [state[key] for key in WRAPPERS if isinstance(state.get(key), dict)] if isinstance(state, dict) else []
        state = inner[0] if inner else state
    is_state_dict = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    )
    if not is_state_dict:
        raise UserError(f"--weights {file} is not a state dict: it must map names to tensors")
    prefixes = [prefix for prefix in PREFIXES if not any(name.startswith(prefix) for name in own)]
    while state and (common := [prefix for prefix in prefixes if all(name.startswith(prefix) for name in state)]):
        state = {name.removeprefix(common[0]): value for name, value in state.items()}
    of_backbone = {name.removeprefix("backbone."): state[name] for name in state if name.startswith("backbone.")}
    if not of_backbone or any(name.startswith("backbone.") for name in own):
        return state
    # a run's, for example, perhaps with another pooling around the backbone
    within = {name.removeprefix("network."): of_backbone[name] for name in of_backbone if name.startswith("network.")}
    return within if within and not any(name.startswith("network.") for name in own) else of_backbone


def _load_safetensors(file: str) -> dict[str, torch.Tensor]:
    """Reads a .safetensors file.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except OSError as error:
        raise UserError(f"{file} can't be opened: {error.strerror or error}") from None
    except SafetensorError as error:
        raise UserError(f"{file} is not an intact .safetensors file ({error}): replace it") from None


def _first_of(names: Sequence[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _unusual_kind(value: torch.Tensor, own: torch.Tensor) -> str | None:
    """What a tensor is, if it can't take the place of a network's own."""
    kinds = {
        "a tensor without values": value.is_meta and not own.is_meta,
        "a quantized tensor": value.is_quantized,
        "a nested or sparse tensor": value.is_nested or value.layout != torch.strided,
        f"of type {str(value.dtype).removeprefix('torch.')}": value.is_complex()
        or (own.is_floating_point() and not value.is_floating_point()),
    }
    return next((kind for kind, is_kind in kinds.items() if is_kind), None)


def check_input(net: EmbeddingNet, arch: str, crop_size: int) -> None:
    """Checks that the network takes images of that size.

    Raises:
        UserError: it doesn't.
    """
    device, was_training = net.mean.device, net.training
    net.eval()
    try:
        with torch.inference_mode():
            net(torch.zeros(1, 3, crop_size, crop_size, dtype=torch.uint8, device=device))
    except SIZE_ERRORS as error:
        raise _refused_size(arch, crop_size, error) from None
    net.train(was_training)
