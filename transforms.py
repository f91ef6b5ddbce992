"""Reading an image, and turning it into the network's input for training and for evaluation."""

from __future__ import annotations

import argparse
import io
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from auxiliaries import FlagParser, UserError, number

Transform = Callable[[torch.Tensor], torch.Tensor]  # image (3, H, W) uint8 -> (3, crop_size, crop_size) uint8

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # Pillow hands others, such as EPS, to other programs
CROP_SCALE = 0.08  # of torchvision's RandomResizedCrop, and of the literature
MAX_SIDE = 8192  # px, of what an image is resized to
LONGEST = 16  # times its shorter side: of a longer image only the middle is resized
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # what a whole file of a format ends with
EXIF_ORIENTATION, TIFF_BITS_PER_SAMPLE, TIFF_MAX_SAMPLE_VALUE = 274, 258, 281  # tags


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of the images that the network gets."""
    group = parser.add_argument_group("images")
    add = group.add_argument
    # fmt: off
    add("--crop_size", type=number(int, 1), help="side of the network's input, px (default: by --arch)")
    add("--resize", type=number(int, 1),
        help="shorter side of a test image before its center crop, px (default: by --arch and --crop_size)")
    add("--crop_scale", type=_share, metavar="MIN",
        help="least share of a training image's area that a random crop shows, in (0, 1] (default: 0.08; glyphs: 0.5, "
        "since less shows little of a character)")
    add("--flip", action="switch", default=None,
        help="mirror half of the training images (default: on; glyphs: off, since a mirrored letter is another one)")
    add("--exif_orientation", action="switch",
        help="turn images as their EXIF data say; the literature doesn't")
    # fmt: on


def _share(text: str) -> float:
    """An argparse type: a number above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def load_image(path: str, exif_orientation: bool = False) -> torch.Tensor:
    """Reads an image of any kind as RGB `(3, H, W)` uint8, transparent parts on white.

    Args:
        path: the file.
        exif_orientation: whether to turn the image as its EXIF data say.

    Raises:
        UserError: the file can't be read as an image.
    """
    try:
        data = np.fromfile(path, np.uint8)
        if data[:3].tolist() == [0xFF, 0xD8, 0xFF]:
            image = _decode_jpeg(data, exif_orientation)
            if image is not None:
                return image
        return _decode_with_pillow(data.tobytes(), exif_orientation)
    except Exception as error:  # Pillow raises anything at all on a damaged file
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> UserError:
    """What to say of a file that can't be read as an image."""
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"{path} can't be read ({error.strerror}): see to its permissions, or remove it")
    if isinstance(error, UnidentifiedImageError):
        reason = f"it doesn't begin as {', '.join(FORMATS[:-1])} or {FORMATS[-1]} files do"
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"{path} is incomplete or corrupt, or not an image ({reason}): replace it, or remove it from its folder and "
        "from lists, and start again"
    )


def _decode_jpeg(data: np.ndarray, exif_orientation: bool) -> torch.Tensor | None:
    """Decodes gray and YCbCr JPEGs; None for what only Pillow reads or reports well (CMYK, truncated files)."""
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        image = decode_jpeg(torch.from_numpy(data), ImageReadMode.UNCHANGED, apply_exif_orientation=exif_orientation)
    except RuntimeError:
        return None
    return image.expand(3, -1, -1) if len(image) == 1 else image if len(image) == 3 else None


def _decode_with_pillow(data: bytes, exif_orientation: bool) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about oddities that Pillow copes with
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            if opened.format in ("PNG", "GIF") and _lacks_end(opened.format, data):  # others are found in decoding
                raise ValueError(f"it is cut off after {len(data)} bytes")
            image = ImageOps.exif_transpose(opened) if exif_orientation else opened
            if opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PPM"):
                values = np.array(image).astype(np.uint32)  # Pillow would clip, not scale
                levels = _white_level(opened, data, int(values.max())) + 1
                image = Image.fromarray((values * 256 // levels).astype(np.uint8))
            elif opened.mode in ("I", "F"):
                raise ValueError(f"32 bits per pixel, mode {opened.mode}, are not supported")
            rgba = image.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _white_level(opened: Image.Image, data: bytes, largest: int) -> int:
    """The value of white in an image of up to 16 bits per pixel, as its file says.

    Args:
        opened: the image.
        data: its file.
        largest: the largest value in it; a file that says less is not believed.
    """
    white = 65535  # to which Pillow scales PGM files by the maximum that they name
    if opened.format == "TIFF":
        tags = opened.tag_v2  # type: ignore[attr-defined]
        bits, named = (int(np.ravel(tags.get(tag, 0))[0]) for tag in (TIFF_BITS_PER_SAMPLE, TIFF_MAX_SAMPLE_VALUE))
        white = 2**bits - 1
        if 255 < named < white and (named + 1).bit_count() == 1:  # all ones: a range, and not this image's brightest
            white = named
    elif opened.format == "PNG" and (at := data.find(b"sBIT", 0, data.find(b"IDAT"))) > 0:
        white = 2 ** data[at + 4] - 1  # PNG wants these bits to be scaled to 16, but not all writers do it
    return white if largest <= white else 65535


def _lacks_end(kind: str, tail: bytes) -> bool:
    """Whether a file seems to be cut off.

    Args:
        kind: Pillow's name for its format.
        tail: its last bytes.
    """
    if kind == "GIF":
        return not tail.rstrip(b"\0\r\n").endswith(b";")
    return ENDS.get(kind, b"") not in tail


def check_image(path: str) -> bool:
    """Makes sure, without decoding it, that a file is an image that can be read, and isn't cut off.

    Returns:
        Whether its EXIF data say that it has to be turned.

    Raises:
        UserError: it can't be read.
    """
    try:
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as opened:
            kind = str(opened.format)
            # Pillow turns TIFF images anyway, and would have to decode a PNG to find what follows its pixels.
            exif = opened.getexif() if "exif" in opened.info else {}
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 64))
            is_suspicious = _lacks_end(kind, file.read())
    except Exception as error:  # Pillow raises anything at all on a damaged file
        raise _unreadable(path, error) from None
    if is_suspicious:
        load_image(path)
    return exif.get(EXIF_ORIENTATION, 1) not in (0, 1)


class RandomCropAndFlip:
    """Random crop, resized to `crop_size` px, flipped half of the time; uint8 in and out.

    It draws what torchvision's RandomResizedCrop and RandomHorizontalFlip draw, and takes half of their time.

    Args:
        crop_size: side of the result, px.
        crop_scale: least share of the image's area that a crop shows.
        flip: whether to flip at all.
    """

    def __init__(self, crop_size: int, crop_scale: float = CROP_SCALE, flip: bool = True):
        from torchvision.transforms.v2 import RandomResizedCrop

        self.crop_size = crop_size
        self.crop = RandomResizedCrop(crop_size, scale=(crop_scale, 1.0))
        self.flip = flip

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        from torchvision.transforms.v2.functional import horizontal_flip_image, resize_image

        box = self.crop.make_params([image])
        top, left = box["top"], box["left"]
        cut = image[None, :, top : top + box["height"], left : left + box["width"]]  # (1, 3, height, width)
        # resizing to the same pixels is faster in this layout
        cut = cut.contiguous(memory_format=torch.channels_last)
        resized = resize_image(cut, [self.crop_size, self.crop_size], antialias=True)[0]
        return horizontal_flip_image(resized) if self.flip and torch.rand(()) < 0.5 else resized


def cut_long_sides(image: torch.Tensor) -> torch.Tensor:
    """The middle of an image whose longer side is more than `LONGEST` times its shorter one: resizing all of it could
    take gigabytes, of which a center crop keeps little."""
    height, width = image.shape[-2:]
    longest = LONGEST * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return image[..., top : top + longest, left : left + longest]


def eval_transform(crop_size: int, resize: int) -> Transform:
    """Shorter side to `resize` px, center crop of `crop_size` px; uint8 in and out."""
    from torchvision.transforms import v2

    return v2.Compose([cut_long_sides, v2.Resize(resize, antialias=True), v2.CenterCrop(crop_size)])


def build_train_transform(opt: argparse.Namespace) -> Transform:
    """The random transform of training images, from the resolved flags."""
    return RandomCropAndFlip(opt.crop_size, opt.crop_scale, opt.flip)


def build_eval_transform(opt: argparse.Namespace | Mapping[str, Any]) -> Transform:
    """The transform of images that `networkselect(opt)` is to embed, a single photo for example.

    Args:
        opt: the resolved flags, or the dict that a run keeps of them in hypa.pkl.

    Raises:
        UserError: images would become too large.

    Example:
        `net(build_eval_transform(opt)(load_image("photo.jpg"))[None])` is the photo's embedding, `(1, D)`.
    """
    flags = opt if isinstance(opt, Mapping) else vars(opt)
    for name in ("crop_size", "resize"):
        if flags[name] > MAX_SIDE:
            gigabytes = 3 * flags[name] ** 2 / 1e9
            raise UserError(
                f"--{name} {flags[name]} would make every image at least {gigabytes:.1f} GB: give at most {MAX_SIDE}"
            )
    return eval_transform(flags["crop_size"], flags["resize"])
