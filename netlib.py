"""Backbones by name (`ARCHS`, `find_arch`) and the embedding network on top (`EmbeddingNet`, `networkselect`)."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
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

import googlenet
from auxiliaries import FlagParser, UserError, check_memory, load_checkpoint, nearest_name, number, user_path

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# What training programs put around a state dict, and before its names.
WRAPPERS = ("state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.", "model.")

EMBEDDER_NORMS = ("none", "layernorm")


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of the network."""
    group = parser.add_argument_group("network")
    add = group.add_argument
    # fmt: off
    add("--arch", default="resnet50", metavar="NAME", fixed=True,
        help="resnet50, googlenet, or another classification network of torchvision (resnet18, vit_b_16, …)")
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
        help="start from the state dict in FILE instead of downloading one")
    add("--freeze_batchnorm", action="switch", default=None,
        help="keep BatchNorm's running statistics fixed; its affine parameters still learn (default: if pretrained)")
    add("--freeze_trunk", action="switch", fixed=True,
        help="train only what stands behind the backbone, which stays as it is (a linear probe): quick, and often "
        "enough for a strong pretrained backbone")
    # fmt: on


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
    """

    build: Callable[[Weights], tuple[nn.Module, int]]
    crop_size: int = 224
    resize: int = 256
    embed_dim: int = 128
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    has_weights: bool = False


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

    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        near = nearest_name(name, [*ARCHS, *names])
        raise UserError(
            f"--arch {name} is unknown{near}: give resnet50, googlenet or a classifier of torchvision.models"
        )
    wanted = torchvision.models.get_model_weights(name)["DEFAULT"].transforms()
    return Arch(
        partial(build_torchvision, name),
        crop_size=wanted.crop_size[0],
        resize=wanted.resize_size[0],
        mean=tuple(wanted.mean),
        std=tuple(wanted.std),
        has_weights=True,
    )


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

    Attributes:
        takes_features: whether it is given features that the backbone has computed before, in place of images.
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
    ):
        super().__init__()
        self.backbone = backbone.requires_grad_(False) if freeze_trunk else backbone
        self.embedding = embedding or build_embedding(num_features, embed_dim)
        self.num_features, self.embed_dim = num_features, embed_dim or num_features
        self.normalize = normalize
        self.freeze_batchnorm, self.freeze_trunk = freeze_batchnorm, freeze_trunk
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
            return self.backbone((images.contiguous() - self.mean) / self.std)

    def embed_features(self, features: torch.Tensor) -> torch.Tensor:
        """The backbone's features `(B, features)` to embeddings `(B, D)`."""
        embeddings = self.embedding(features)
        return F.normalize(embeddings, dim=1) if self.normalize else embeddings

    @property
    def last_linear(self) -> nn.Linear | None:
        """The last linear layer of the embedding; None where the features are the embedding."""
        return next((layer for layer in [*self.embedding.modules()][::-1] if isinstance(layer, nn.Linear)), None)

    def train(self, mode: bool = True) -> EmbeddingNet:
        """Sets the mode; a frozen backbone and frozen BatchNorm layers stay in evaluation mode."""
        super().train(mode)
        if self.freeze_trunk:
            self.backbone.eval()
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
    file = opt.weights if load_pretrained else None
    if opt.not_pretrained:
        weights = Weights.RANDOM
    else:
        weights = Weights.DOWNLOADED if load_pretrained and file is None else Weights.LOADED_LATER
    if weights.are_downloaded and not arch.has_weights:
        raise UserError(f"--arch {opt.arch} has no pretrained weights: drop --pretrained, or give --weights FILE")
    try:
        backbone, features = arch.build(weights)
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
    check_memory(16.0 * features * opt.embed_dim, f"--embed_dim {opt.embed_dim}")  # weights, gradient, Adam's moments
    embedding = build_embedding(features, opt.embed_dim, opt.embedder, opt.embedder_norm)
    freezing = {"freeze_batchnorm": opt.freeze_batchnorm, "freeze_trunk": opt.freeze_trunk}
    net = EmbeddingNet(
        backbone, features, opt.embed_dim, opt.normalize, mean=arch.mean, std=arch.std, embedding=embedding, **freezing
    )
    check_input(net, opt.arch, opt.crop_size)
    return net.eval() if is_finished else net


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
    if opt.embedder and not opt.embed_dim:
        raise UserError(
            "--embedder puts hidden layers before the embedding layer, which --embed_dim 0 leaves out: drop one of them"
        )


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
    """Loads a backbone's state dict: torchvision's, whose classifier is ignored, or that of a run's checkpoint.

    Raises:
        UserError: the file can't be read, its entries don't match the backbone's, or they aren't finite numbers.
    """
    own = backbone.state_dict()
    state = read_state_dict(file, own)
    # torchvision renames the entries of its DenseNets' files when it loads them
    state = {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", name): state[name] for name in state}
    removed = {path for path, module in backbone.named_modules() if isinstance(module, nn.Identity)}
    removed |= {"aux1", "aux2", "AuxLogits"}  # auxiliary classifiers of GoogLeNet and Inception
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


def read_state_dict(file: str, own: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Reads a state dict, without what training programs put around it or before its names.

    Args:
        file: what `torch.save` wrote.
        own: the entries that are looked for.

    Raises:
        UserError: it can't be read, or is not a state dict.
    """
    state: Any = load_checkpoint(file)
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
    is_whole_network = of_backbone and not any(name.startswith("backbone.") for name in own)  # a run's, for example
    return of_backbone if is_whole_network else state


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
    except (AssertionError, RuntimeError, ValueError) as error:
        fitting = find_arch(arch).crop_size
        raise UserError(
            f"--arch {arch} can't take images of --crop_size {crop_size} ({error}): try {fitting}"
        ) from None
    net.train(was_training)
