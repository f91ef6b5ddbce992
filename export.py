"""A finished network in formats that other programs read: ONNX, TorchScript and safetensors.

What is written is read again, and its embeddings of a few of the run's own images are compared with the network's.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import config
import datasets
import netlib
import transforms
from auxiliaries import UserError, as_json, atomic_write, reason

TOLERANCE = 1e-4  # between an embedding's coordinates here and there
NUM_IMAGES = 16  # of the run's own, to compare embeddings of
BATCHES = (1, 4, 11)  # in which they are embedded: the formats take any number
MAX_ONNX = 2**31 - 1  # bytes of a file

Run = Callable[[torch.Tensor], torch.Tensor]  # images (B, 3, H, W) uint8 to embeddings (B, D)


class PlainNet(nn.Module):
    """An embedding network as a plain function, in float32 and without checks of its input.

    Args:
        net: the network, without adapters.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, net: netlib.EmbeddingNet):
        super().__init__()
        self.backbone, self.embedding, self.normalize = net.backbone, net.embedding, net.normalize
        self.register_buffer("mean", net.mean)
        self.register_buffer("std", net.std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` uint8 RGB to embeddings `(B, D)`."""
        embeddings = self.embedding(self.backbone((images.float() - self.mean) / self.std))
        return F.normalize(embeddings, dim=1) if self.normalize else embeddings


def export_network(net: netlib.EmbeddingNet, opt: argparse.Namespace, file_format: str, path: Path) -> float:
    """Writes a network to a file, and compares what other programs will make of it with the network.

    Args:
        net: the network, on the CPU.
        opt: the resolved flags of its run, whose data are needed.
        file_format: a key of `FORMATS`.
        path: the file; one that is there is replaced.

    Returns:
        The largest difference between coordinates of embeddings.

    Raises:
        UserError: the format can't hold the network, its embeddings differ, the run's images can't be read, or the file
            can't be written; nothing is left behind.
    """
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--out {path} can't be written: give the name of a file in a folder that can be written to")
    chosen, images = FORMATS[file_format], sample_images(opt)
    chosen.check(net)
    with torch.inference_mode():
        expected = net(images).float()  # (P, D)
    plain = merge_adapters(copy.deepcopy(net)).eval().requires_grad_(False)
    with atomic_write(path) as beside:
        try:
            with quiet():
                chosen.save(plain, beside, describe(net, opt))
                found = in_batches(chosen.load(beside), images)
        except (UserError, OSError):
            raise
        except Exception as error:  # the exporters raise anything at all
            raise UserError(
                f"--format {file_format} can't hold --arch {opt.arch} ({reason(error)}): choose another one of "
                f"{', '.join(FORMATS)}"
            ) from None
        difference = float((found - expected).abs().max())
        if not difference <= TOLERANCE:
            raise UserError(
                f"--format {file_format}: embeddings of {len(images)} images differ from the run's by up to "
                f"{difference:.2g}, more than {TOLERANCE:g}, so nothing is written: choose another one of "
                f"{', '.join(FORMATS)}"
            )
    print(f"{path}: embeddings of {len(images)} of the run's images differ from the run's by at most {difference:.1e}")
    return difference


def sample_images(opt: argparse.Namespace, count: int = NUM_IMAGES) -> torch.Tensor:
    """A few of a run's images, from all over its test (or else validation) classes, as its network takes them.

    Returns:
        `(P, 3, H, W)` uint8.

    Raises:
        UserError: they aren't there, or one can't be read.
    """
    try:
        splits = datasets.give_splits(opt)
    except UserError as error:
        raise UserError(f"an export is checked on images of the run: {error}") from None
    images = (splits.test or splits.val)[0].query if splits.test or splits.val else splits.train
    dataset = datasets.ImageDataset(images, transforms.build_eval_transform(opt), opt.exif_orientation)
    pixels = []
    for position in np.unique(np.linspace(0, len(images) - 1, count).round().astype(int)).tolist():
        item = dataset.load(position)
        if isinstance(item, UserError):
            raise item
        pixels.append(item[0])
    return torch.stack(pixels)


@torch.inference_mode()
def in_batches(run: Run, images: torch.Tensor) -> torch.Tensor:
    """Embeddings `(P, D)` of images `(P, 3, H, W)`, in batches of the sizes `BATCHES` in turn.

    Raises:
        ValueError: there are more or fewer embeddings than images.
    """
    parts: list[torch.Tensor] = []
    start = 0
    while start < len(images):
        batch = images[start : start + BATCHES[len(parts) % len(BATCHES)]]
        parts.append(run(batch))
        if len(parts[-1]) != len(batch):
            raise ValueError(f"it gives {len(parts[-1])} embeddings of {len(batch)} images")
        start += len(batch)
    return torch.cat(parts)


def describe(net: netlib.EmbeddingNet, opt: argparse.Namespace) -> dict[str, str]:
    """What a file says of its network: how to make its input of a photo, and the run's configuration as JSON."""
    steps = f"shorter side to {opt.resize} px ({opt.interpolation}, antialiased), center crop of {opt.crop_size} px"
    return {
        "input": f"images: uint8 RGB, (batch, 3, {opt.crop_size}, {opt.crop_size}), not normalized",
        "preprocessing": ", ".join(opt.eval_transforms or [steps]),
        "output": f"embeddings: float32, (batch, {net.embed_dim}), {'' if net.normalize else 'not '}of length 1",
        "configuration": as_json({**config.configuration(opt), "lora": None}),  # adapters are merged
    }


def merge_adapters(net: netlib.EmbeddingNet) -> netlib.EmbeddingNet:
    """Adds a network's low-rank adapters to the weights that they adapt, and removes them; the network is changed."""
    if not any(name.rpartition(".")[2].startswith("lora_") for name, _ in net.named_modules()):
        return net
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged: list[str] = []
    for name, module in [*net.named_modules()]:
        if not isinstance(module, BaseTunerLayer) or any(name.startswith(f"{outer}.") for outer in merged):
            continue
        if hasattr(module, "unload_and_optionally_merge_module"):  # of attention, which consists of several layers
            base = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            module.merge()
            base = module.get_base_layer()
        parent, _, attribute = name.rpartition(".")
        setattr(net.get_submodule(parent), attribute, base)
        merged.append(name)
    return net


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside the block, what the exporters say of themselves is not printed: deprecations, and how far they are."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


# Formats


def example_of(description: Mapping[str, str]) -> torch.Tensor:
    """Two gray images `(2, 3, H, W)` of the size that a description's configuration says."""
    side = json.loads(description["configuration"])["crop_size"]
    return torch.full((2, 3, side, side), 127, dtype=torch.uint8)


def save_onnx(net: netlib.EmbeddingNet, path: Path, description: Mapping[str, str]) -> None:
    """Writes an ONNX file with the input `images`, the output `embeddings`, and the description as metadata."""
    program = torch.onnx.export(
        PlainNet(net).eval(),
        (example_of(description),),
        input_names=["images"],
        output_names=["embeddings"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(description)
    program.save(path, external_data=False)


def load_onnx(path: Path) -> Run:
    """What an ONNX file computes, by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["embeddings"], {"images": images.numpy()})[0])


def check_onnx(net: netlib.EmbeddingNet) -> None:
    """Makes sure that an ONNX file can hold a network, and that it can be written here.

    Raises:
        UserError: it can't.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx needs {error.name}: pip install onnx onnxscript onnxruntime") from None
    size = sum(value.numel() * value.element_size() for value in net.state_dict().values())
    if size > MAX_ONNX:
        raise UserError(
            f"--format onnx: a file holds at most 2 GiB, and the network's weights take {size / 2**30:.1f}: choose "
            "safetensors or torchscript"
        )


def save_torchscript(net: netlib.EmbeddingNet, path: Path, description: Mapping[str, str]) -> None:
    """Writes a TorchScript file, with the description as extra files of the names of its entries."""
    with torch.no_grad():
        traced = torch.jit.trace(PlainNet(net).eval(), example_of(description), check_trace=False)
    with open(path, "wb") as file:  # it refuses some names, such as those without a suffix
        torch.jit.save(traced, file, _extra_files=dict(description))


def load_torchscript(path: Path) -> Run:
    """What a TorchScript file computes."""
    return torch.jit.load(path, map_location="cpu")


def save_safetensors(net: netlib.EmbeddingNet, path: Path, description: Mapping[str, str]) -> None:
    """Writes a network's weights under the names of its state dict, with the description as metadata."""
    from safetensors.torch import save

    # clones, since it refuses tensors that share memory, as layers that share weights do
    weights = {name: value.clone(memory_format=torch.contiguous_format) for name, value in net.state_dict().items()}
    path.write_bytes(save(weights, metadata={"format": "pt", **description}))


def load_safetensors(path: Path) -> netlib.EmbeddingNet:
    """The network that a safetensors file of `export_network` holds, in evaluation mode.

    Raises:
        UserError: it can't be read, or is not such a file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            description = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a mapping)
    except OSError as error:
        raise UserError(f"{path} can't be opened: {error.strerror or error}") from None
    except SafetensorError as error:
        raise UserError(f"{path} is not an intact .safetensors file ({error}): export it again") from None
    if "configuration" not in description:
        raise UserError(f"{path} doesn't say of which network it is: give a file that inference.py export wrote")
    net = netlib.networkselect(json.loads(description["configuration"]))
    net.load_state_dict(state)
    return net


@dataclass(frozen=True)
class Format:
    """A row of `FORMATS`.

    Attributes:
        save: writes a network without adapters and its description to a file.
        load: what a file computes.
        check: raises a `UserError` where the format can't hold a network.
    """

    save: Callable[[netlib.EmbeddingNet, Path, Mapping[str, str]], None]
    load: Callable[[Path], Run]
    check: Callable[[netlib.EmbeddingNet], Any] = lambda net: None


FORMATS = {
    "onnx": Format(save_onnx, load_onnx, check_onnx),
    "torchscript": Format(save_torchscript, load_torchscript),
    "safetensors": Format(save_safetensors, load_safetensors),
}
