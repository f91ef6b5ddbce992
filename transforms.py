"""Reading an image, and turning it into the network's input for training and for evaluation.

--train_transforms and --eval_transforms are names in `TRANSFORMS` with parameters, which `Pipeline` builds:
`Resize:256 RandomResizedCrop:227,scale=0.16..1 RandomHorizontalFlip ColorJitter:brightness=0.2`.
"""

from __future__ import annotations

import argparse
import inspect
import io
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from auxiliaries import FlagParser, UserError, check_params, nearest_name, number, reason, seeded, shown

Transform = Callable[[torch.Tensor], torch.Tensor]  # image (3, H, W) uint8 -> (3, crop_size, crop_size) uint8

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # Pillow hands others, such as EPS, to other programs
INTERPOLATIONS = ("bilinear", "bicubic")
CROP_SCALE = 0.08  # of torchvision's RandomResizedCrop, and of the literature
MAX_SIDE = 8192  # px, of what an image is resized to
LONGEST = 16  # times its shorter side: of a longer image only the middle is resized
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # what a whole file of a format ends with
EXIF_SIDEWAYS = (5, 6, 7, 8)  # orientations whose images are as wide as they are stored high
EXIF_ORIENTATION, TIFF_BITS_PER_SAMPLE, TIFF_MAX_SAMPLE_VALUE = 274, 258, 281  # tags
TIFF_DATA = ((273, 279), (324, 325))  # tags of where strips, or tiles, of pixels are, and of their lengths in bytes

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in px, from the upper left corner; x2 and y2 lie just outside
BOX_MARK = "#box="


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of the images that the network gets."""
    group = parser.add_argument_group("images")
    add = group.add_argument
    # fmt: off
    add("--crop_size", type=number(int, 1), help="side of the network's input, px (default: by --arch)")
    add("--resize", type=number(int, 1),
        help="shorter side of a test image before its center crop, px (default: by --arch and --crop_size)")
    add("--interpolation", choices=INTERPOLATIONS, help="how images are resized (default: by --arch)")
    add("--crop_scale", type=_share, metavar="MIN",
        help="least share of a training image's area that a random crop shows, in (0, 1] (default: 0.08; glyphs "
        "and torchvision's characters and signs: 0.5, since less shows little of a character)")
    add("--flip", action="switch", default=None,
        help="mirror half of the training images (default: on; glyphs and torchvision's characters and signs: "
        "off, since a mirrored letter is another one)")
    add("--exif_orientation", action="switch",
        help="turn images as their EXIF data say; the literature doesn't")
    add("--train_transforms", nargs="+", metavar="NAME[:PARAMETERS]", fixed=True,
        help="transforms of training images in place of --crop_scale and --flip: classes of torchvision.transforms.v2, "
        "in order, each with its parameters, by position or as key=value, such as Resize:256 "
        f"RandomResizedCrop:227,scale=0.16..1; A..B is a pair of numbers, [A,B] a list; {', '.join(TRANSFORMS)}")
    add("--eval_transforms", nargs="+", metavar="NAME[:PARAMETERS]", fixed=True,
        help="likewise of test images, in place of --resize, such as Resize:256 CenterCrop:227; both must give square "
        "images of one size, which takes the place of --crop_size")
    # fmt: on


# Classes of torchvision.transforms.v2 that flags can use.
TRANSFORMS = (
    *("AugMix", "AutoAugment", "CenterCrop", "ColorJitter", "ElasticTransform", "GaussianBlur", "GaussianNoise"),
    *("Grayscale", "Identity", "JPEG", "Pad", "RGB", "RandAugment", "RandomAdjustSharpness", "RandomAffine"),
    *("RandomAutocontrast", "RandomChannelPermutation", "RandomCrop", "RandomEqualize", "RandomErasing"),
    *("RandomGrayscale", "RandomHorizontalFlip", "RandomInvert", "RandomPerspective", "RandomPhotometricDistort"),
    *("RandomPosterize", "RandomResize", "RandomResizedCrop", "RandomRotation", "RandomShortestSize", "RandomSolarize"),
    *("RandomVerticalFlip", "RandomZoomOut", "Resize", "ScaleJitter", "TrivialAugmentWide"),
)

NOT_RANDOM = ("CenterCrop", "Grayscale", "Identity", "Pad", "RGB", "Resize")

# Its other classes, and why they can't be used.
_OF_BOXES, _OF_OTHERS = "it is for boxes or key points", "it takes other transforms, which flags can't give"
_OF_TYPES = "images are uint8 tensors, which the network normalizes itself"
NOT_TRANSFORMS: dict[str, str] = {
    **dict.fromkeys(("ClampBoundingBoxes", "ClampKeyPoints", "ConvertBoundingBoxFormat", "RandomIoUCrop"), _OF_BOXES),
    **dict.fromkeys(("SanitizeBoundingBoxes", "SanitizeKeyPoints", "SetClampingMode"), _OF_BOXES),
    **dict.fromkeys(("Compose", "RandomApply", "RandomChoice", "RandomOrder"), _OF_OTHERS),
    **dict.fromkeys(("ConvertImageDtype", "Normalize", "ToDtype", "ToTensor", "ToImage", "ToPILImage"), _OF_TYPES),
    **dict.fromkeys(("PILToTensor", "ToPureTensor"), _OF_TYPES),
    **dict.fromkeys(("CutMix", "MixUp"), "it mixes the images and labels of a batch"),
    **dict.fromkeys(("FiveCrop", "TenCrop"), "it gives several images"),
    "Lambda": "it takes a function, which flags can't give",
    "LinearTransformation": "it takes a matrix, which flags can't give",
    "Transform": "it is the base of the others",
    "UniformTemporalSubsample": "it is for videos",
}
# Largest numbers in parameters whose names contain these words.
LIMITS = {"size": MAX_SIDE, "padding": MAX_SIDE, "range": LONGEST, "num_": 100, "depth": 100, "width": 100}
PROBES = ((375, 500), (500, 375))  # height and width of images on which transforms are tried


def _share(text: str) -> float:
    """An argparse type: a number above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def with_box(file: str, box: Box) -> str:
    """The path of a part of an image: `photo.jpg#box=10,20,110,140`.

    Wherever images are named by their paths, it names that part alone.
    """
    x1, y1, x2, y2 = box
    return f"{file}{BOX_MARK}{x1},{y1},{x2},{y2}"


def split_box(path: str) -> tuple[str, Box | None]:
    """The file of an image's path, and the box of its part, if it is a part."""
    path = os.fspath(path)
    if BOX_MARK not in path:
        return path, None
    file, _, box = path.rpartition(BOX_MARK)
    if not re.fullmatch(r"\d+,\d+,\d+,\d+", box, re.ASCII):
        return path, None
    x1, y1, x2, y2 = map(int, box.split(","))
    return file, (x1, y1, x2, y2)


def load_image(path: str, exif_orientation: bool = False) -> torch.Tensor:
    """Reads an image of any kind as RGB `(3, H, W)` uint8, transparent parts on white.

    Args:
        path: the file, or a part of its image as `with_box` names it.
        exif_orientation: whether to turn the image as its EXIF data say, before a part is cut out.

    Raises:
        UserError: the file can't be read as an image, or the part lies outside of it.
    """
    file, box = split_box(path)
    try:
        image = _decode(np.fromfile(file, np.uint8), exif_orientation)
    except Exception as error:  # Pillow raises anything at all on a damaged file
        raise _unreadable(file, error) from None
    if box is None:
        return image
    _check_box(file, box, image.shape[2], image.shape[1])
    x1, y1, x2, y2 = box
    return image[:, y1:y2, x1:x2]


def _decode(data: np.ndarray, exif_orientation: bool) -> torch.Tensor:
    """Decodes an image file's bytes."""
    if data[:3].tolist() == [0xFF, 0xD8, 0xFF]:
        image = _decode_jpeg(data, exif_orientation)
        if image is not None:
            return image
    return _decode_with_pillow(data.tobytes(), exif_orientation)


def _check_box(file: str, box: Box, width: int, height: int) -> None:
    """Makes sure that a box lies in the image of a file.

    Raises:
        UserError: it doesn't.
    """
    x1, y1, x2, y2 = box
    for axis, first, last, size, side in (("x", x1, x2, width, "wide"), ("y", y1, y2, height, "high")):
        if last > size:
            raise UserError(f"{file} is {size} px {side}, and {axis}2 of its crop box is {last}: correct the box")
        if first >= last:
            raise UserError(f"{axis}2 {last} of a crop box in {file} is not above its {axis}1 {first}: correct the box")


def _unreadable(path: str, error: Exception) -> UserError:
    """What to say of a file that can't be read as an image."""
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"{path} can't be read ({error.strerror}): see to its permissions, or remove it")
    if isinstance(error, UnidentifiedImageError):
        why = f"not {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    else:
        why = reason(error)
    return UserError(
        f"{path} is incomplete or corrupt, or not an image ({why}): replace it, or remove it from its folder and "
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
            # others are found in decoding
            if (opened.format == "PNG" and _lacks_end("PNG", data)) or (opened.format == "GIF" and _is_cut_gif(data)):
                raise ValueError(f"it is cut off after {len(data)} bytes")
            _refuse_32_bits(opened)
            image = ImageOps.exif_transpose(opened) if exif_orientation else opened
            if opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PPM"):
                values = np.array(image).astype(np.uint32)  # Pillow would clip, not scale
                levels = _white_level(opened, data, int(values.max())) + 1
                image = Image.fromarray((values * 256 // levels).astype(np.uint8))
            return from_pillow(image)


def from_pillow(image: Image.Image) -> torch.Tensor:
    """An image of up to 8 bits per channel as RGB `(3, H, W)` uint8, transparent parts on white."""
    rgba = image.convert("RGBA")
    rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _refuse_32_bits(opened: Image.Image) -> None:
    if opened.mode == "F" or (opened.mode == "I" and opened.format != "PPM"):
        raise ValueError(f"32 bits per pixel, mode {opened.mode}, are not supported")


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


def _is_cut_gif(data: bytes) -> bool:
    """Whether a GIF file lacks its end, without which Pillow would fill up a picture without a word."""

    def after_table(at: int, flags: int) -> int:
        return at + (3 << (flags & 7) + 1 if flags & 128 else 0)

    try:
        at = after_table(13, data[10])
        while data[at] != ord(";"):
            kind = data[at]
            at = after_table(at + 10, data[at + 9]) + 1 if kind == ord(",") else at + 2 if kind == ord("!") else at + 1
            if kind in b",!":
                while data[at]:  # the length of the next piece
                    at += data[at] + 1
    except IndexError:
        return True
    return False


def _lacks_pixels(opened: Image.Image, size: int) -> bool:
    """Whether a file of a format without an end mark is shorter than what its header says, or may be."""
    if opened.format == "TIFF":
        tags = opened.tag_v2  # type: ignore[attr-defined]
        places = [(np.atleast_1d(tags.get(at, ())), np.atleast_1d(tags.get(length, ()))) for at, length in TIFF_DATA]
        return any(at + length > size for ats, lengths in places for at, length in zip(ats, lengths))
    if opened.format not in ("BMP", "PPM"):
        return False
    for decoder, (left, top, right, bottom), offset, args in opened.tile:  # type: ignore[attr-defined]
        args = args if isinstance(args, tuple) else (args,)
        if decoder not in ("raw", "ppm"):  # compressed, or written as text
            return True
        bits = {"1": 1, "I": 32 if decoder == "raw" else 16, "F": 32}.get(opened.mode, 8 * len(opened.getbands()))
        if decoder == "ppm" and args[1] > 255:
            bits = 16 * len(opened.getbands())
        row = args[1] if opened.format == "BMP" else (bits * (right - left) + 7) // 8
        if offset + row * (bottom - top) > size:
            return True
    return False


def check_image(path: str, exif_orientation: bool = False) -> bool:
    """Makes sure, without decoding it, that a file is an image that can be read, and isn't cut off.

    Args:
        path: the file, or a part of its image as `with_box` names it.
        exif_orientation: whether it will be turned as its EXIF data say.

    Returns:
        Whether its EXIF data say that it has to be turned.

    Raises:
        UserError: it can't be read, or the part lies outside of it.
    """
    name, box = split_box(path)
    try:
        with open(name, "rb") as file, Image.open(file, formats=FORMATS) as opened:
            kind, sides = str(opened.format), opened.size
            # Pillow turns TIFF images anyway, and would have to decode a PNG to find what follows its pixels.
            exif = opened.getexif() if "exif" in opened.info else {}
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 64))
            is_suspicious = _lacks_end(kind, file.read()) or _lacks_pixels(opened, size)
            _refuse_32_bits(opened)
    except Exception as error:  # Pillow raises anything at all on a damaged file
        raise _unreadable(name, error) from None
    orientation = exif.get(EXIF_ORIENTATION, 1)
    if is_suspicious:
        load_image(path, exif_orientation)
    elif box is not None:
        _check_box(name, box, *(sides[::-1] if exif_orientation and orientation in EXIF_SIDEWAYS else sides))
    return orientation not in (0, 1)


class RandomCropAndFlip:
    """Random crop, resized to `crop_size` px, flipped half of the time; uint8 in and out.

    It draws what torchvision's RandomResizedCrop and RandomHorizontalFlip draw, and takes half of their time.

    Args:
        crop_size: side of the result, px.
        crop_scale: least share of the image's area that a crop shows.
        flip: whether to flip at all.
        interpolation: one of `INTERPOLATIONS`.
    """

    def __init__(
        self, crop_size: int, crop_scale: float = CROP_SCALE, flip: bool = True, interpolation: str = "bilinear"
    ):
        from torchvision.transforms.v2 import RandomResizedCrop

        self.crop_size = crop_size
        self.crop = RandomResizedCrop(crop_size, scale=(crop_scale, 1.0))
        self.flip, self.interpolation = flip, interpolation

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        from torchvision.transforms.v2.functional import horizontal_flip_image, resize_image

        box = self.crop.make_params([image])
        top, left = box["top"], box["left"]
        cut = image[None, :, top : top + box["height"], left : left + box["width"]]  # (1, 3, height, width)
        # resizing to the same pixels is faster in this layout
        cut = cut.contiguous(memory_format=torch.channels_last)
        resized = resize_image(cut, [self.crop_size, self.crop_size], self.interpolation, antialias=True)[0]
        return horizontal_flip_image(resized) if self.flip and torch.rand(()) < 0.5 else resized


def cut_long_sides(image: torch.Tensor) -> torch.Tensor:
    """The middle of an image whose longer side is more than `LONGEST` times its shorter one: resizing all of it could
    take gigabytes, of which a center crop keeps little."""
    height, width = image.shape[-2:]
    longest = LONGEST * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return image[..., top : top + longest, left : left + longest]


def eval_transform(crop_size: int, resize: int, interpolation: str = "bilinear") -> Transform:
    """Shorter side to `resize` px, center crop of `crop_size` px; uint8 in and out."""
    from torchvision.transforms import v2

    mode = v2.InterpolationMode(interpolation)
    return v2.Compose([cut_long_sides, v2.Resize(resize, mode, antialias=True), v2.CenterCrop(crop_size)])


class Pipeline:
    """Transforms of torchvision in order, all of which give square images of one size; uint8 in and out.

    Very long images are cut first, see `cut_long_sides`.

    Args:
        flag: where they were given, such as `--train_transforms`.
        entries: each `NAME` or `NAME:PARAMETERS`, see `build_transform`.
        interpolation: of those that resize, unless their parameters say another one.

    Attributes:
        side: of the images that they give, px.
        fixed: the first entries, up to the first one that is random.

    Raises:
        UserError: a transform can't be built or applied, or what they give differs in size, or is not square.
    """

    def __init__(self, flag: str, entries: Sequence[str], interpolation: str = "bilinear"):
        self.flag = flag
        self.transforms = [(entry, build_transform(flag, entry, interpolation)) for entry in entries]
        is_random = [entry.partition(":")[0] not in NOT_RANDOM for entry in entries]
        self.fixed = list(entries)[: [*is_random, True].index(True)]
        self.side: int | None = None
        sizes = []
        with seeded(0):
            for height, width in PROBES * 2:  # twice, since some sizes are random
                sizes.append(tuple(self(torch.full((3, height, width), 128, dtype=torch.uint8)).shape[-2:]))
        (height, width), *others = dict.fromkeys(sizes)
        if others:
            raise self._sizes_differ(sizes[0], others[0])
        if min(height, width) < 1:
            raise UserError(f"{flag} gives images without pixels, {width} × {height} px: change their parameters")
        if height != width:
            raise UserError(
                f"{flag} gives images of {width} × {height} px, and the network takes square ones: end with CenterCrop:"
                f"{min(width, height)}"
            )
        self.side = height

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return self.finish(self.begin(image))

    def begin(self, image: torch.Tensor) -> torch.Tensor:
        """Applies the transforms up to the first one that is random."""
        return self._apply(cut_long_sides(image), self.transforms[: len(self.fixed)])

    def finish(self, image: torch.Tensor) -> torch.Tensor:
        """Applies the others, and checks what they give."""
        result = self._apply(image, self.transforms[len(self.fixed) :])
        if result.dtype != torch.uint8 or len(result) != 3:
            raise UserError(
                f"{self.flag} gives images of {len(result)} channels of {str(result.dtype).removeprefix('torch.')}, "
                "and the network takes 3 channels of uint8: give Grayscale num_output_channels=3, or drop it"
            )
        if self.side is not None and result.shape[-2:] != (self.side, self.side):
            raise self._sizes_differ((self.side, self.side), tuple(result.shape[-2:]))
        return result

    def _apply(self, image: torch.Tensor, named: Sequence[tuple[str, Transform]]) -> torch.Tensor:
        result = image
        for entry, transform in named:
            try:
                result = transform(result)
            except Exception as error:  # torchvision raises anything at all
                height, width = result.shape[-2:]
                raise UserError(
                    f"{self.flag}: {entry} can't be applied to an image of {width} × {height} px "
                    f"({reason(error)}): change its parameters, or what comes before it"
                ) from None
        return result

    def _sizes_differ(self, one: Sequence[int], other: Sequence[int]) -> UserError:
        return UserError(
            f"{self.flag} gives images of different sizes ({one[1]} × {one[0]} and {other[1]} × {other[0]} px): end "
            "with a transform that gives one size, such as CenterCrop:224"
        )


def split_random(transform: Transform) -> tuple[Transform, Transform]:
    """What a transform does before anything random, and what it does after that."""
    return (transform.begin, transform.finish) if isinstance(transform, Pipeline) else (unchanged, transform)


def unchanged(image: torch.Tensor) -> torch.Tensor:
    """The image as it is."""
    return image


def build_transform(flag: str, entry: str, interpolation: str = "bilinear") -> Callable[[torch.Tensor], torch.Tensor]:
    """Builds a transform of torchvision from text.

    Args:
        flag: where it was given.
        entry: its name, and behind a colon its parameters, separated by commas: the first ones by position, others as
            `key=value`. A value is a number, true, false, null, text, a pair of numbers `A..B` or a list `[A,B]`.
        interpolation: its parameter of this name, if it resizes and `entry` doesn't give it.

    Raises:
        UserError: it is unknown, can't be used, or doesn't take these parameters.
    """
    from torchvision.transforms import v2

    name, _, arguments = entry.partition(":")
    if name in NOT_TRANSFORMS:
        raise UserError(f"{flag}: {name} can't be used: {NOT_TRANSFORMS[name]}")
    if name not in TRANSFORMS:
        near = nearest_name(name, TRANSFORMS)
        raise UserError(f"{flag}: {shown(name)} is unknown{near}; main.py --help lists all transforms")
    kind = getattr(v2, name)
    known = inspect.signature(kind).parameters
    params = check_params(flag, _read_arguments(flag, name, arguments, list(known)), kind)
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in params:
            raise UserError(f"{flag}: {name} needs {key}: {name}:{key}=…")
    _refuse_large(flag, name, params)
    if "antialias" in known:  # those that resize
        params.setdefault("interpolation", interpolation)
    try:
        for key, kinds in (("interpolation", v2.InterpolationMode), ("policy", v2.AutoAugmentPolicy)):
            if key in params:
                params[key] = kinds(params[key])
        return kind(**params)
    except Exception as error:  # torchvision raises anything at all
        raise UserError(f"{flag}: {shown(entry)} can't be used ({reason(error)}): change its parameters") from None


def _refuse_large(flag: str, name: str, params: Mapping[str, Any]) -> None:
    """Refuses parameters by which images would take gigabytes, or minutes."""
    for key, value in params.items():
        numbers = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int | float)]
        for part, limit in LIMITS.items():
            if part in key and any(abs(one) > limit for one in numbers):
                raise UserError(
                    f"{flag}: {name} {key}={value} would take too much memory or time: give at most {limit}"
                )


def _read_arguments(flag: str, name: str, text: str, known: Sequence[str]) -> dict[str, str]:
    """The parameters of a transform by name, as `check_params` takes them.

    Args:
        flag: where it was given.
        name: of the transform.
        text: what stands behind its name, see `build_transform`.
        known: the names of its parameters, in order.

    Raises:
        UserError: there are too many, or one is given twice or is empty.
    """
    params: dict[str, str] = {}
    for position, part in enumerate(re.split(r",(?![^\[]*\])", text) if text else ()):
        key, equals, value = part.partition("=")
        if not (value if equals else part):
            raise UserError(f"{flag}: {name}: the parameter {key or position + 1} is empty: give its value, or drop it")
        if not equals:
            if position >= len(known):
                raise UserError(f"{flag}: {name} takes {len(known)} parameter(s), and {shown(part)} is one more")
            if position > len(params) or list(params) != list(known[:position]):
                raise UserError(f"{flag}: {name}: {shown(part)} stands behind key=value: give it as key=value, too")
            key, value = known[position], part
        if key in params:
            raise UserError(f"{flag}: {name}: {shown(key)} is given twice: drop one")
        params[key] = _as_list(value)
    return params


def _as_list(text: str) -> str:
    """`A..B` as `[A,B]`, where A and B are numbers; any other text as it is."""
    ends = text.split("..")
    try:
        is_pair = len([float(end) for end in ends]) == 2
    except ValueError:
        return text
    return f"[{','.join(ends)}]" if is_pair else text


def input_side(opt: argparse.Namespace) -> int | None:
    """The side of the images that --train_transforms and --eval_transforms give, px; None without either.

    Raises:
        UserError: one of them can't be used, they give two sizes, or they contradict flags that they take the place of.
    """
    replaced = {"train_transforms": ("crop_scale", "flip"), "eval_transforms": ("resize",)}
    given = {name: flags for name, flags in replaced.items() if getattr(opt, name)}
    sides = {}
    for name, flags in given.items():
        useless = [flag for flag in flags if getattr(opt, flag) is not None]
        if useless:
            raise UserError(f"--{useless[0]} does nothing beside --{name}: drop one of them")
        sides[f"--{name}"] = Pipeline(f"--{name}", getattr(opt, name)).side
    (first, side), *others = sides.items() if sides else [("", None)]
    for other, other_side in others:
        if other_side != side:
            raise UserError(f"{first} gives images of {side} px, and {other} of {other_side} px: make them equal")
    if side is not None and opt.crop_size not in (None, side):
        raise UserError(f"--crop_size {opt.crop_size} contradicts {first}, which gives images of {side} px: drop it")
    return side


def build_train_transform(opt: argparse.Namespace) -> Transform:
    """The random transform of training images, from the resolved flags."""
    if opt.train_transforms:
        return Pipeline("--train_transforms", opt.train_transforms, opt.interpolation)
    return RandomCropAndFlip(opt.crop_size, opt.crop_scale, opt.flip, opt.interpolation)


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
    if flags.get("eval_transforms"):
        return Pipeline("--eval_transforms", flags["eval_transforms"], flags["interpolation"])
    for name in ("crop_size", "resize"):
        if flags[name] > MAX_SIDE:
            gigabytes = 3 * flags[name] ** 2 / 1e9
            raise UserError(
                f"--{name} {flags[name]} would make every image at least {gigabytes:.1f} GB: give at most {MAX_SIDE}"
            )
    return eval_transform(flags["crop_size"], flags["resize"], flags.get("interpolation") or "bilinear")
