"""Reading an image, and turning it into the network's input for training and for evaluation."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from auxiliaries import FlagParser, UserError, number

Transform = Callable[[torch.Tensor], torch.Tensor]  # image (3, H, W) uint8 -> (3, crop_size, crop_size) uint8


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of the images that the network gets."""
    group = parser.add_argument_group("images")
    add = group.add_argument
    # fmt: off
    add("--crop_size", type=number(int, 1), help="side of the network's input, px (default: by --arch)")
    add("--resize", type=number(int, 1),
        help="shorter side of a test image before its center crop, px (default: by --arch and --crop_size)")
    # fmt: on


def load_image(path: str) -> torch.Tensor:
    """Reads an image of any kind as RGB `(3, H, W)` uint8, transparent parts on white.

    Raises:
        UserError: the file can't be read as an image.
    """
    try:
        data = np.fromfile(path, np.uint8)
        if data[:3].tolist() == [0xFF, 0xD8, 0xFF] and (image := _decode_jpeg(data)) is not None:
            return image
        with Image.open(path) as opened:
            if opened.mode.startswith("I;16"):  # Pillow would clip, not scale
                rgba = Image.fromarray((np.array(opened) >> 8).astype(np.uint8)).convert("RGBA")
            elif opened.mode in ("I", "F"):
                raise ValueError(f"32 bits per pixel, mode {opened.mode}, are not supported")
            else:
                rgba = opened.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} is incomplete or corrupt, or not an image ({error}): replace it, or remove it from its folder and "
            "from lists, and start again"
        ) from None


def _decode_jpeg(data: np.ndarray) -> torch.Tensor | None:
    """Decodes gray and YCbCr JPEGs; None for what only Pillow reads or reports well (CMYK, truncated files)."""
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        image = decode_jpeg(torch.from_numpy(data), ImageReadMode.UNCHANGED)
    except RuntimeError:
        return None
    return image.expand(3, -1, -1) if len(image) == 1 else image if len(image) == 3 else None


class RandomCropAndFlip:
    """Random crop of 8 to 100 % of the area, resized to `crop_size` px, flipped half of the time; uint8 in and out.

    It draws what torchvision's RandomResizedCrop and RandomHorizontalFlip draw, and takes half of their time.
    """

    def __init__(self, crop_size: int):
        from torchvision.transforms.v2 import RandomResizedCrop

        self.crop_size = crop_size
        self.crop = RandomResizedCrop(crop_size)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        from torchvision.transforms.v2.functional import horizontal_flip_image, resize_image

        box = self.crop.make_params([image])
        top, left = box["top"], box["left"]
        cut = image[None, :, top : top + box["height"], left : left + box["width"]]  # (1, 3, height, width)
        # resizing to the same pixels is faster in this layout
        cut = cut.contiguous(memory_format=torch.channels_last)
        resized = resize_image(cut, [self.crop_size, self.crop_size], antialias=True)[0]
        return horizontal_flip_image(resized) if torch.rand(()) < 0.5 else resized


def eval_transform(crop_size: int, resize: int) -> Transform:
    """Shorter side to `resize` px, center crop of `crop_size` px; uint8 in and out."""
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(crop_size)])


def build_train_transform(opt: argparse.Namespace) -> Transform:
    """The random transform of training images, from the resolved flags."""
    return RandomCropAndFlip(opt.crop_size)


def build_eval_transform(opt: argparse.Namespace | Mapping[str, Any]) -> Transform:
    """The transform of images that `networkselect(opt)` is to embed, a single photo for example.

    Args:
        opt: the resolved flags, or the dict that a run keeps of them in hypa.pkl.

    Example:
        `net(build_eval_transform(opt)(load_image("photo.jpg"))[None])` is the photo's embedding, `(1, D)`.
    """
    flags = opt if isinstance(opt, Mapping) else vars(opt)
    return eval_transform(flags["crop_size"], flags["resize"])
