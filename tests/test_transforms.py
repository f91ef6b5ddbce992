"""Reading images of every kind, and the transforms of training and test images."""

from __future__ import annotations

import argparse
import errno
import io
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageOps
from torchvision import transforms as v1
from torchvision.transforms import v2

import config
from auxiliaries import FlagParser, UserError
from transforms import (
    EXIF_ORIENTATION,
    LONGEST,
    MAX_SIDE,
    NOT_TRANSFORMS,
    TRANSFORMS,
    Pipeline,
    RandomCropAndFlip,
    add_arguments,
    build_eval_transform,
    build_train_transform,
    build_transform,
    check_image,
    cut_long_sides,
    eval_transform,
    load_image,
)


def picture(size: tuple[int, int], grain: int = 0) -> Image.Image:
    """A colorful image of the size (width, height), smooth enough for JPEG unless `grain` adds noise to each pixel."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = rng.integers(-grain, grain + 1, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8))


def as_array(image: Image.Image, mode: str = "RGB") -> np.ndarray:
    return np.asarray(image.convert(mode)).astype(np.float64)


def kinds_of_images() -> dict[str, tuple[Image.Image, dict, np.ndarray, float]]:
    """File name -> image, keywords of `save`, expected `(H, W, 3)` or `(H, W)`, tolerated mean absolute difference."""
    rgb = picture((48, 36))
    pixels, gray = as_array(rgb), as_array(rgb, "L")
    ramp = np.linspace(0, 255, 48).round().astype(np.uint8) * np.ones((36, 1), np.uint8)  # from left to right
    on_white = ramp / 255 * (gray - 255) + 255
    light = pixels.max(axis=2, keepdims=True)  # 255 - black
    inks = np.concatenate([255 * (1 - pixels / light), 255 - light], axis=2).round().astype(np.uint8)
    palette = rgb.quantize(8)
    is_clear = np.asarray(palette) == 3
    bits = Image.fromarray(gray.astype(np.uint8)).convert("1")
    alpha = Image.fromarray(ramp)
    rgba, gray_alpha = rgb.copy(), rgb.convert("L")
    rgba.putalpha(alpha)
    gray_alpha.putalpha(alpha)
    return {
        "rgb.png": (rgb, {}, pixels, 0),
        "rgb.bmp": (rgb, {}, pixels, 0),
        "rgb.jpg": (rgb, {"quality": 95}, pixels, 2),
        "progressive.jpg": (rgb, {"quality": 95, "progressive": True}, pixels, 2),
        "gray.jpg": (rgb.convert("L"), {"quality": 95}, gray, 2),
        "gray.png": (rgb.convert("L"), {}, gray, 0),
        "cmyk.jpg": (Image.frombytes("CMYK", rgb.size, inks.tobytes()), {"quality": 95}, pixels, 3),
        "palette.gif": (palette, {}, as_array(palette), 0),
        "palette.png": (palette, {"transparency": 3}, np.where(is_clear[..., None], 255, as_array(palette)), 0),
        "rgba.png": (rgba, {}, ramp[..., None] / 255 * (pixels - 255) + 255, 1),
        "gray_alpha.png": (gray_alpha, {}, on_white, 1),
        "one_bit.png": (bits, {}, as_array(bits, "L"), 0),
        "sixteen_bit.png": (Image.fromarray((ramp.astype(np.uint16) << 8) + 7), {}, ramp, 1),
    }


@pytest.mark.parametrize("name", kinds_of_images())
def test_images_of_every_kind_become_rgb(name: str, tmp_path: Path) -> None:
    image, keywords, expected, tolerance = kinds_of_images()[name]
    image.save(tmp_path / name, **keywords)
    loaded = load_image(str(tmp_path / name))
    assert (loaded.dtype, loaded.shape) == (torch.uint8, (3, 36, 48))
    channels = expected if expected.ndim == 3 else expected[..., None]
    assert np.abs(loaded.permute(1, 2, 0).numpy() - channels).mean() <= tolerance


@pytest.mark.parametrize("size", [(48, 36), (37, 91), (1, 1), (640, 480)], ids=str)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_jpegs_are_decoded_as_by_pillow(size: tuple[int, int], subsampling: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    picture(size).save(path, subsampling=subsampling)
    with Image.open(path) as image:
        difference = np.abs(load_image(str(path)).permute(1, 2, 0).numpy() - as_array(image))
    assert difference.mean() <= 1


def encode(suffix: str, **keywords: object) -> bytes:
    buffer = io.BytesIO()
    picture((48, 36)).save(buffer, suffix, **keywords)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["jpeg", "png", "gif", "bmp", "webp", "tiff", "ppm"])
def test_an_image_truncated_anywhere_is_a_clear_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    data = encode(suffix)
    lengths = {*np.linspace(0, len(data) - 1, 60).astype(int).tolist(), *range(len(data) - 40, len(data))}
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        with pytest.raises(UserError) as error:
            load_image(str(path))
        assert str(error.value).startswith(f"{path} is incomplete or corrupt, or not an image")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["jpeg", "png", "gif", "bmp", "webp", "tiff", "ppm"])
def test_a_damaged_image_is_read_or_a_clear_error(suffix: str, tmp_path: Path) -> None:
    """Pillow raises errors of a dozen kinds, and warns of others."""
    path = tmp_path / f"a.{suffix}"
    whole = np.frombuffer(encode(suffix), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(150):
        data = whole.copy()
        places = rng.integers(0, rng.choice([40, len(data)]), rng.integers(1, 20))  # half of the time in the header
        data[places] = rng.integers(0, 256, len(places))
        path.write_bytes(data.tobytes())
        for read in (load_image, check_image):
            message = f"{path}"
            try:
                read(str(path))
            except UserError as error:
                message = str(error)
            assert message.startswith(str(path))
            assert "\n" not in message


@pytest.mark.parametrize(
    "exception", [struct.error("x"), IndexError(), RecursionError("x"), MemoryError(), OSError("x")]
)
def test_whatever_pillow_raises_is_one_sentence(
    exception: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise exception

    (tmp_path / "a.png").write_bytes(encode("png"))
    monkeypatch.setattr(Image, "open", fail)
    for read in (load_image, check_image):
        with pytest.raises(UserError, match=r"a\.png is incomplete or corrupt, or not an image \(\w+\): replace it"):
            read(str(tmp_path / "a.png"))


@pytest.mark.parametrize("read", [load_image, check_image])
def test_files_that_cannot_be_opened_are_one_sentence(
    read: Callable[[str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    names = ["none.png", "loop.png", "", "x" * 5000, "a\0b.png", "\ud800.png", "caf\udce9.png"]
    for name in names:
        with pytest.raises(UserError) as error:
            read(f"{tmp_path}/{name}")
        assert "\n" not in str(error.value)

    def refuse(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "a.png").write_bytes(encode("png"))
    monkeypatch.setattr(np, "fromfile", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"a\.png can't be read \(Permission denied\): see to its permissions"):
        read(str(tmp_path / "a.png"))


def test_formats_that_other_programs_would_have_to_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jpg"
    picture((48, 36)).save(path, "EPS")
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: started.append(args))
    for read in (load_image, check_image):
        with pytest.raises(UserError, match=r"\(not JPEG, PNG, BMP, GIF, WEBP, TIFF or PPM\)"):
            read(str(path))
    assert not started


def with_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return png[:33] + chunk + png[33:]


def tiff_of_12_bits(values: np.ndarray) -> bytes:
    """A little-endian TIFF that packs two values into three bytes."""
    height, width = values.shape
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    data = packed.astype(np.uint8).tobytes()
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (279, len(data))])
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", 9) + entries + bytes(4)


RAMP = np.linspace(0, 1, 48 * 36).reshape(36, 48)  # from black to white


def files_of_16_bits() -> dict[str, bytes]:
    """Files of the same ramp, each of which says which value is white."""

    def ramp(white: int) -> np.ndarray:
        return (RAMP * white).round().astype(np.uint16)

    def encoded(values: np.ndarray, suffix: str, **keywords: object) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, suffix, **keywords)
        return buffer.getvalue()

    def pgm(white: int) -> bytes:
        return f"P5 48 36 {white}\n".encode() + ramp(white).astype(">u2").tobytes()

    plain = f"P2 48 36 1000\n{' '.join(map(str, ramp(1000).ravel()))}\n".encode()
    png = encoded(ramp(65535), "png")
    return {
        "16.png": png,
        "16.tiff": encoded(ramp(65535), "tiff"),
        "65535.pgm": pgm(65535),
        "4095.pgm": pgm(4095),
        "1000.pgm": pgm(1000),
        "plain.pgm": plain,
        "15.pgm": b"P5 48 36 15\n" + (RAMP * 15).round().astype(np.uint8).tobytes(),
        "12_of_16.png": with_chunk(encoded(ramp(4095), "png"), b"sBIT", bytes([12])),
        "12_scaled_to_16.png": with_chunk(png, b"sBIT", bytes([12])),
        "12.tiff": tiff_of_12_bits(ramp(4095)),
        "12_of_16.tiff": encoded(ramp(4095), "tiff", tiffinfo={281: 4095}),
        "its_brightest_named.tiff": encoded(ramp(65535), "tiff", tiffinfo={281: 65534}),
        "wrongly_named.tiff": encoded(ramp(65535), "tiff", tiffinfo={281: 4095}),
    }


@pytest.mark.parametrize("name", files_of_16_bits())
def test_images_of_up_to_16_bits_are_scaled_by_what_their_files_say(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(files_of_16_bits()[name])
    loaded = load_image(str(tmp_path / name)).numpy()
    assert not check_image(str(tmp_path / name))
    assert np.abs(loaded - RAMP * 255).max() <= (9 if name == "15.pgm" else 1.1)
    assert (loaded.min(), loaded.max()) == (0, 255)


def test_images_of_16_bits_keep_their_upper_eight(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (36, 48)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert (load_image(str(tmp_path / "a.png")).numpy() == values >> 8).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpeg", "webp", "png"])
def test_exif_orientation_is_ignored_unless_it_is_asked_for(suffix: str, orientation: int, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    path.write_bytes(encode(suffix, exif=exif, **({} if suffix == "png" else {"quality": 95})))
    with Image.open(path) as image:
        stored, turned = as_array(image), as_array(ImageOps.exif_transpose(image))
    for expected, applied in ((stored, False), (turned, True)):
        loaded = load_image(str(path), applied).permute(1, 2, 0).numpy()
        assert loaded.shape == expected.shape
        assert np.abs(loaded - expected).mean() <= 1
    assert check_image(str(path)) == (orientation > 1)


def test_checking_an_image_finds_what_loading_finds_and_decodes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix in ("jpeg", "png", "gif"):
        path, data = tmp_path / f"a.{suffix}", encode(suffix)
        for damaged in (data[:-1], data[: len(data) // 2], data[:20], b""):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match="incomplete or corrupt"):
                check_image(str(path))
        path.write_bytes(data + bytes(100))  # trailing zeros hide the end of a JPEG: it is decoded to make sure
        assert check_image(str(path)) is False
        path.write_bytes(data)
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "load", None)
            patch.setattr("transforms.load_image", None)
            assert check_image(str(path)) is False


@pytest.mark.parametrize("suffix", ["bmp", "ppm", "tiff"])
def test_checking_finds_missing_pixels_of_formats_without_an_end_mark(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{suffix}"
    bits, deep = Image.new("1", (48, 36)), Image.fromarray(np.zeros((36, 48), np.uint16))
    kinds = [picture((48, 36)), picture((47, 36)).convert("L"), picture((48, 36)).quantize(8), bits, deep]
    for image in kinds[:2] if suffix == "ppm" else kinds[:4] if suffix == "bmp" else kinds:
        image.save(path)
        data = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "load", None)
            assert check_image(str(path)) is False
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(UserError, match="incomplete or corrupt"):
            check_image(str(path))
    if suffix == "tiff":
        picture((48, 36)).save(path, compression="tiff_lzw")
        data = path.read_bytes()
        path.write_bytes(data[: len(data) - 40])
        with pytest.raises(UserError, match="incomplete or corrupt"):
            check_image(str(path))


@pytest.mark.parametrize("name", ["float.tiff", "integer.tiff", "float.pfm"])
def test_checking_refuses_32_bits_per_pixel_as_loading_does(name: str, tmp_path: Path) -> None:
    kind = np.int32 if name.startswith("integer") else np.float32
    Image.fromarray(np.zeros((36, 48), kind)).save(tmp_path / name, "PPM" if name.endswith("pfm") else "TIFF")
    for read in (load_image, check_image):
        with pytest.raises(UserError, match="32 bits per pixel"):
            read(str(tmp_path / name))


def test_what_follows_a_whole_gif_does_not_matter(tmp_path: Path) -> None:
    frames = [picture((48, 36)), picture((48, 36)).rotate(180)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], comment=b"a; b")
    whole = load_image(str(tmp_path / "a.gif"))
    with open(tmp_path / "a.gif", "ab") as file:
        file.write(b"<!-- uploaded by a camera -->")
    assert check_image(str(tmp_path / "a.gif")) is False
    assert torch.equal(load_image(str(tmp_path / "a.gif")), whole)


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (3, 1_000)], ids=str)
def test_a_very_long_image_is_cut_before_it_is_resized(size: tuple[int, int]) -> None:
    """Shorter side to 256 px: otherwise 1 × 30,000 px would take 5.9 GB."""
    height, width = size
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, max(0, height // 2 - 3) : height // 2 + 4, max(0, width // 2 - 3) : width // 2 + 4] = 255
    assert sorted(cut_long_sides(image).shape[1:]) == [min(size), LONGEST * min(size)]
    crop = eval_transform(224, 256)(image)
    assert crop.shape == (3, 224, 224)
    assert (crop == 255).all()  # its middle is still the image's
    assert RandomCropAndFlip(32)(image).shape == (3, 32, 32)


@pytest.mark.parametrize("size", [(16, 1), (5, 80), (40, 30)], ids=str)
def test_other_images_are_not_cut(size: tuple[int, int]) -> None:
    image = torch.arange(3 * size[0] * size[1]).reshape(3, *size)
    assert torch.equal(cut_long_sides(image), image)


@pytest.mark.parametrize(("crop_scale", "flip"), [(0.08, True), (0.5, False)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(120, 90), (61, 83), (200, 20), (7, 5)], ids=str)
def test_training_crops_are_torchvisions(
    size: tuple[int, int], mode: str, crop_scale: float, flip: bool, tmp_path: Path
) -> None:
    picture(size, grain=80).convert(mode).save(tmp_path / "a.jpg")
    image = load_image(str(tmp_path / "a.jpg"))
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
    # draws scale, ratio, place, flip
    reference = v1.Compose([v1.RandomResizedCrop(32, (crop_scale, 1)), *[v1.RandomHorizontalFlip()][: int(flip)]])
    is_default = (crop_scale, flip) == (0.08, True)
    transform = RandomCropAndFlip(32) if is_default else RandomCropAndFlip(32, crop_scale, flip)
    shifts = []
    previous = np.zeros((32, 32, 3))
    for seed in range(50):
        torch.manual_seed(seed)
        expected = as_array(reference(pillow))
        torch.manual_seed(seed)
        crop = transform(image)
        assert (crop.dtype, crop.shape) == (torch.uint8, (3, 32, 32))
        assert np.abs(crop.permute(1, 2, 0).numpy() - expected).mean() <= 2
        shifts.append(np.abs(expected - previous).mean())
        previous = expected
    assert np.median(shifts) > 5 or not is_default  # another box would have been noticed


@pytest.mark.parametrize("size", [(300, 301), (37, 91), (256, 256), (641, 200), (5, 7), (1, 1)], ids=str)
@pytest.mark.parametrize(("crop_size", "resize"), [(224, 256), (227, 256), (33, 33)])
def test_evaluation_crops_are_torchvisions(size: tuple[int, int], crop_size: int, resize: int) -> None:
    pillow = picture(size, grain=80)
    image = torch.from_numpy(np.array(pillow)).permute(2, 0, 1)
    crop = eval_transform(crop_size, resize)(image)
    assert (crop.dtype, crop.shape) == (torch.uint8, (3, crop_size, crop_size))
    expected = as_array(v1.Compose([v1.Resize(resize), v1.CenterCrop(crop_size)])(pillow))
    assert np.abs(crop.permute(1, 2, 0).numpy() - expected).mean() <= 2


@pytest.mark.parametrize("kind", ["Namespace", "dict"])
def test_a_single_photo_gets_the_transform_that_flags_or_a_runs_dict_say(kind: str, tmp_path: Path) -> None:
    picture((90, 60), grain=80).save(tmp_path / "photo.jpg")
    opt = argparse.Namespace(crop_size=24, resize=30, arch="resnet50")
    image = load_image(str(tmp_path / "photo.jpg"))
    photo = build_eval_transform(opt if kind == "Namespace" else vars(opt))(image)
    assert (photo.dtype, photo.shape) == (torch.uint8, (3, 24, 24))
    assert torch.equal(photo, eval_transform(24, 30)(image))


def test_transforms_of_the_flags_can_be_sent_to_workers() -> None:
    """Where workers are not forked, they get the transforms pickled."""
    opt = resolved("--crop_size", "16", "--resize", "20", "--crop_scale", "0.3")
    named = resolved(
        "--train_transforms", "Resize:20", "RandomCrop:16", "ColorJitter:0.5", "--eval_transforms", "Resize:[16,16]"
    )
    image = torch.from_numpy(np.array(picture((40, 30)))).permute(2, 0, 1)
    builders = (build_train_transform, build_eval_transform)
    for transform in (build(flags) for build in builders for flags in (opt, named)):
        torch.manual_seed(0)
        here = transform(image)
        torch.manual_seed(0)
        assert torch.equal(pickle.loads(pickle.dumps(transform))(image), here)


def test_flags_of_images_may_be_left_to_architecture_and_dataset() -> None:
    parser = FlagParser()
    add_arguments(parser)
    left = {"crop_size": None, "resize": None, "crop_scale": None, "flip": None, "exif_orientation": False}
    left |= {"interpolation": None, "train_transforms": None, "eval_transforms": None}
    assert vars(parser.parse_args([])) == left
    flags = ["--crop_size", "48", "--resize", "60", "--crop_scale", "1", "--no-flip", "--exif_orientation"]
    given = {"crop_size": 48, "resize": 60, "crop_scale": 1.0, "flip": False, "exif_orientation": True}
    assert vars(parser.parse_args(flags)) == {**left, **given}
    for flag, value in (("crop_size", "0"), ("crop_scale", "0"), ("crop_scale", "1.01"), ("crop_scale", "nan")):
        with pytest.raises(UserError, match=flag):
            parser.parse_args([f"--{flag}", value])


def test_the_crops_of_the_flags_are_the_transforms() -> None:
    image = torch.arange(40 * 40).div(7).to(torch.uint8).reshape(1, 40, 40).expand(3, -1, -1)
    transform = build_train_transform(resolved("--crop_size", "16", "--crop_scale", "1", "--no-flip"))
    torch.manual_seed(0)
    one = transform(image)
    torch.manual_seed(0)
    assert torch.equal(one, RandomCropAndFlip(16, 1.0, False)(image))
    torch.manual_seed(0)
    assert not torch.equal(one, RandomCropAndFlip(16)(image))


@pytest.mark.parametrize(
    ("crop_size", "resize", "words"), [(224, 20_000, "--resize 20000"), (10**9, 10**9, "--crop_size")]
)
def test_images_of_gigabytes_are_refused(crop_size: int, resize: int, words: str) -> None:
    with pytest.raises(UserError, match=rf"{words}.* GB: give at most {MAX_SIDE}"):
        build_eval_transform({"crop_size": crop_size, "resize": resize})
    assert build_eval_transform({"crop_size": MAX_SIDE, "resize": MAX_SIDE}) is not None


# Transforms by name


def resolved(*flags: str) -> argparse.Namespace:
    """The resolved flags of a run."""
    return config.resolve(config.parse([*SMALL_NETWORK, *flags]))


SMALL_NETWORK = ("--arch", "resnet18", "--not_pretrained", "--dataset", "birds", "--savename", "run")
PHOTO = torch.from_numpy(np.array(picture((60, 45), grain=40))).permute(2, 0, 1)

# Name -> its parameters; then what gives square images.
EXAMPLES = {
    "AugMix": "severity=2,interpolation=nearest",
    "AutoAugment": "policy=cifar10",
    "CenterCrop": "24",
    "ColorJitter": "brightness=0.2,contrast=0.9..1.1,saturation=[0.5,1.5],hue=0.1",
    "ElasticTransform": "alpha=20,sigma=[4,5]",
    "GaussianBlur": "3,sigma=0.1..2",
    "GaussianNoise": "sigma=0.05",
    "Grayscale": "num_output_channels=3",
    "Identity": "",
    "JPEG": "quality=[50,90]",
    "Pad": "4,fill=128,padding_mode=constant",
    "RGB": "",
    "RandAugment": "2,magnitude=5",
    "RandomAdjustSharpness": "2,p=1",
    "RandomAffine": "degrees=-10..10,translate=0.1..0.1,fill=[1,2,3]",
    "RandomAutocontrast": "p=1",
    "RandomChannelPermutation": "",
    "RandomCrop": "24,padding=4",
    "RandomEqualize": "p=1",
    "RandomErasing": "p=1,scale=0.02..0.1",
    "RandomGrayscale": "p=1",
    "RandomHorizontalFlip": "p=1",
    "RandomInvert": "1",
    "RandomPerspective": "distortion_scale=0.3,p=1",
    "RandomPhotometricDistort": "brightness=0.9..1.1,p=1",
    "RandomPosterize": "bits=4,p=1",
    "RandomResize": "20,30",
    "RandomResizedCrop": "24,scale=0.16..1,ratio=[0.9,1.1]",
    "RandomRotation": "15,expand=true",
    "RandomShortestSize": "min_size=[24,32]",
    "RandomSolarize": "threshold=128,p=1",
    "RandomVerticalFlip": "p=1",
    "RandomZoomOut": "side_range=1..2,p=1",
    "Resize": "24",
    "ScaleJitter": "target_size=[24,32]",
    "TrivialAugmentWide": "num_magnitude_bins=10",
}


def test_every_transform_of_torchvision_is_taken_or_left_out_with_a_reason() -> None:
    kinds = {name for name, kind in vars(v2).items() if isinstance(kind, type) and issubclass(kind, v2.Transform)}
    assert {*TRANSFORMS, *NOT_TRANSFORMS} >= kinds
    assert not {*TRANSFORMS} & {*NOT_TRANSFORMS}
    assert list(EXAMPLES) == list(TRANSFORMS)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_by_name_are_torchvisions(name: str) -> None:
    entry = f"{name}:{EXAMPLES[name]}" if EXAMPLES[name] else name
    pipeline = Pipeline("--train_transforms", [entry, "Resize:[16,16]"])
    assert pipeline.side == 16
    keywords: dict[str, Any] = {
        "AugMix": {"severity": 2, "interpolation": v2.InterpolationMode.NEAREST},
        "ColorJitter": {"brightness": 0.2, "contrast": (0.9, 1.1), "saturation": (0.5, 1.5), "hue": 0.1},
        "GaussianBlur": {"kernel_size": 3, "sigma": (0.1, 2.0)},
        "RandomAffine": {"degrees": (-10, 10), "translate": (0.1, 0.1), "fill": [1, 2, 3]},
        "RandomResizedCrop": {"size": 24, "scale": (0.16, 1), "ratio": (0.9, 1.1)},
        "RandomRotation": {"degrees": 15, "expand": True},
        "ScaleJitter": {"target_size": (24, 32)},
        "Resize": {"size": 24},
    }
    torch.manual_seed(0)
    image = pipeline(PHOTO)
    assert (image.dtype, image.shape) == (torch.uint8, (3, 16, 16))
    if name in keywords:
        torch.manual_seed(0)
        transformed = getattr(v2, name)(**keywords[name])(PHOTO)
        assert torch.equal(image, v2.Resize([16, 16], antialias=True)(transformed))


def test_transforms_that_resize_do_it_as_the_architecture_wants_unless_they_say_how() -> None:
    bicubic = v2.InterpolationMode.BICUBIC
    for entries, interpolation in (
        (["Resize:[16,16]"], "bicubic"),
        (["Resize:[16,16],interpolation=bicubic"], "bilinear"),
    ):
        assert torch.equal(Pipeline("--x", entries, interpolation)(PHOTO), v2.Resize([16, 16], bicubic)(PHOTO))
    rotation = build_transform("--x", "RandomRotation:10", "bicubic")
    assert v2.InterpolationMode(rotation.interpolation) == v2.InterpolationMode.NEAREST  # type: ignore[attr-defined]
    opt = resolved("--eval_transforms", "Resize:[16,16]", "--interpolation", "bicubic")
    assert torch.equal(build_eval_transform(opt)(PHOTO), v2.Resize([16, 16], bicubic)(PHOTO))
    assert torch.equal(build_eval_transform(vars(opt))(PHOTO), v2.Resize([16, 16], bicubic)(PHOTO))  # as in hypa.pkl


def test_the_networks_input_follows_from_transforms() -> None:
    opt = resolved("--train_transforms", "Resize:40", "RandomResizedCrop:28,scale=0.16..1")
    assert (opt.crop_size, opt.resize, opt.crop_scale, opt.flip) == (28, 32, None, None)
    opt = resolved("--eval_transforms", "Resize:40", "CenterCrop:35")
    assert (opt.crop_size, opt.resize, opt.crop_scale, opt.flip) == (35, None, 0.08, True)
    assert build_train_transform(opt)(PHOTO).shape == (3, 35, 35)
    opt = resolved("--train_transforms", "RandomCrop:24", "--eval_transforms", "CenterCrop:24", "--crop_size", "24")
    assert (opt.crop_size, opt.resize, opt.crop_scale, opt.flip) == (24, None, None, None)


def test_a_runs_configuration_with_transforms_is_read_back(tmp_path: Path) -> None:
    entries = ["Resize:40", "RandomResizedCrop:28,scale=0.16..1", "ColorJitter:brightness=[0.9,1.1]"]
    opt = resolved("--train_transforms", *entries, "--eval_transforms", "Resize:32", "CenterCrop:28")
    config.save_config(tmp_path / "config.yaml", config.configuration(opt))
    for argv, stored in ((["--config", str(tmp_path / "config.yaml")], None), ([], tmp_path / "config.yaml")):
        again = config.resolve(config.parse(argv, stored))
        assert config.configuration(again) == config.configuration(opt)
        config.refuse_unused(again, config.given_flags(argv))
    (tmp_path / "own.yaml").write_text(
        "train_transforms:\n  - Resize:40\n  - CenterCrop:28\neval_transforms: CenterCrop:28\n"
    )
    opt = resolved("--config", str(tmp_path / "own.yaml"))
    assert (opt.train_transforms, opt.eval_transforms) == (["Resize:40", "CenterCrop:28"], ["CenterCrop:28"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["Resise:32"], "--train_transforms: Resise is unknown (did you mean Resize?)"),
        (["resize:32"], "did you mean Resize?"),
        (["Resize:sise=32"], "Resize has no parameter sise (did you mean size?); it takes size, interpolation,"),
        (["Resize"], "Resize needs size: Resize:size=…"),
        (["Resize:"], "Resize needs size"),
        (["CenterCrop:28,29"], "CenterCrop takes 1 parameter(s), and 29 is one more"),
        (["CenterCrop:size="], "CenterCrop: the parameter size is empty"),
        (["CenterCrop:28,"], "the parameter 2 is empty"),
        (["CenterCrop:28,size=28"], "CenterCrop: size is given twice"),
        (["RandomCrop:padding=4,28"], "28 stands behind key=value: give it as key=value, too"),
        (["RandomResizedCrop:28,scale=0.5"], "scale of RandomResizedCrop takes a list, not 0.5"),
        (["RandomHorizontalFlip:p=often", "CenterCrop:28"], "p of RandomHorizontalFlip takes a number, not often"),
        (["RandomHorizontalFlip:p=2", "CenterCrop:28"], "RandomHorizontalFlip:p=2 can't be used ("),
        (["Resize:28,interpolation=cubic"], "Resize:28,interpolation=cubic can't be used ('cubic' is not a valid"),
        (["AutoAugment:policy=own"], "'own' is not a valid AutoAugmentPolicy"),
        (
            ["Normalize:0.5,0.5"],
            "Normalize can't be used: images are uint8 tensors, which the network normalizes itself",
        ),
        (["RandomApply"], "RandomApply can't be used: it takes other transforms"),
        (["FiveCrop:28"], "it gives several images"),
        (["MixUp"], "it mixes the images and labels of a batch"),
        (["Resize:256"], "gives images of different sizes (341 × 256 and 256 × 341 px): end with"),
        (["RandomResize:20,400"], "gives images of different sizes"),
        (
            ["CenterCrop:[24,48]"],
            "gives images of 48 × 24 px, and the network takes square ones: end with CenterCrop:24",
        ),
        (["CenterCrop:28", "Grayscale"], "gives images of 1 channels of uint8, and the network takes 3"),
        (["RandomCrop:400"], "RandomCrop:400 can't be applied to an image of 500 × 375 px (Required crop size"),
        (["Resize:20000", "CenterCrop:28"], "Resize size=20000 would take too much memory or time: give at most 8192"),
        (["Resize:[28,20000]"], "would take too much memory or time"),
        (["RandAugment:99999999999", "CenterCrop:28"], "num_ops=99999999999 would take too much memory or time"),
        (["CenterCrop:0"], "gives images without pixels, 0 × 0 px"),
        (
            ["RandomZoomOut:side_range=1..1000"],
            "side_range=[1, 1000] would take too much memory or time: give at most 16",
        ),
        (
            ["CenterCrop:28", "--crop_scale", "0.5"],
            "--crop_scale does nothing beside --train_transforms: drop one of them",
        ),
        (["CenterCrop:28", "--no-flip"], "--flip does nothing beside --train_transforms"),
        (
            ["CenterCrop:28", "--eval_transforms", "CenterCrop:28", "--resize", "32"],
            "--resize does nothing beside --eval",
        ),
        (
            ["CenterCrop:28", "--crop_size", "32"],
            "--crop_size 32 contradicts --train_transforms, which gives images of 28",
        ),
        (
            ["CenterCrop:28", "--eval_transforms", "CenterCrop:32"],
            "--train_transforms gives images of 28 px, and --eval_transforms of 32 px: make them equal",
        ),
    ],
)
def test_transforms_that_cannot_be_used_are_one_sentence(flags: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        resolved("--train_transforms", *flags)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_image_that_transforms_cannot_take_is_one_sentence() -> None:
    pipeline = Pipeline("--eval_transforms", ["CenterCrop:[64,64]", "RandomCrop:50"])
    assert pipeline(PHOTO).shape == (3, 50, 50)
    pipeline = Pipeline("--eval_transforms", ["RandomCrop:50"])
    with pytest.raises(
        UserError, match=r"--eval_transforms: RandomCrop:50 can't be applied to an image of 60 × 45 px \("
    ):
        pipeline(PHOTO)
    long = torch.full((3, 20, 30_000), 255, dtype=torch.uint8)
    long[..., 14_800:15_200] = 0
    assert (Pipeline("--eval_transforms", ["Resize:[16,16]"])(long) == 0).all()  # only the middle is resized


def test_images_are_resized_by_the_interpolation_of_the_architecture() -> None:
    image = torch.randint(0, 256, (3, 60, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    given = ["--arch", "timm:test_vit", "--crop_size", "32", "--crop_scale", "1", "--no-flip"]
    opt = config.resolve(config.parse(given))
    wanted = v2.functional.resize(image, [opt.resize], v2.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(build_eval_transform(opt)(image), v2.functional.center_crop(wanted, [32, 32]))
    random = v2.RandomResizedCrop(32, scale=(1.0, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    torch.manual_seed(0)
    expected = random(image)
    torch.manual_seed(0)
    assert (build_train_transform(opt)(image).int() - expected.int()).abs().max() <= 1
    assert not torch.equal(build_eval_transform({**vars(opt), "interpolation": "bilinear"})(image), wanted)
