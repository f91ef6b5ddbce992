"""Reading images of every kind, and the transforms of training and test images."""

from __future__ import annotations

import argparse
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1

from auxiliaries import FlagParser, UserError
from transforms import (
    RandomCropAndFlip,
    add_arguments,
    build_eval_transform,
    build_train_transform,
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


def encode(suffix: str) -> bytes:
    buffer = io.BytesIO()
    picture((48, 36)).save(buffer, suffix)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["jpeg", "png", "gif", "bmp", "webp"])
def test_an_image_truncated_anywhere_is_a_clear_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    data = encode(suffix)
    for length in np.linspace(0, 0.98 * len(data), 100).astype(int):
        path.write_bytes(data[:length])
        with pytest.raises(UserError) as error:
            load_image(str(path))
        assert str(error.value).startswith(f"{path} is incomplete or corrupt, or not an image")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(120, 90), (61, 83), (200, 20), (7, 5)], ids=str)
def test_training_crops_are_torchvisions(size: tuple[int, int], mode: str, tmp_path: Path) -> None:
    picture(size, grain=80).convert(mode).save(tmp_path / "a.jpg")
    image = load_image(str(tmp_path / "a.jpg"))
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
    reference = v1.Compose([v1.RandomResizedCrop(32), v1.RandomHorizontalFlip()])  # draws scale, ratio, place, flip
    transform = RandomCropAndFlip(32)
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
    assert np.median(shifts) > 5  # another box would have been noticed


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
    opt = argparse.Namespace(crop_size=16, resize=20)
    image = torch.from_numpy(np.array(picture((40, 30)))).permute(2, 0, 1)
    for transform in (build_train_transform(opt), build_eval_transform(opt)):
        torch.manual_seed(0)
        here = transform(image)
        torch.manual_seed(0)
        assert torch.equal(pickle.loads(pickle.dumps(transform))(image), here)


def test_sizes_are_given_by_flags_and_may_be_left_to_the_architecture() -> None:
    parser = FlagParser()
    add_arguments(parser)
    assert vars(parser.parse_args([])) == {"crop_size": None, "resize": None}
    assert vars(parser.parse_args(["--crop_size", "48", "--resize", "60"])) == {"crop_size": 48, "resize": 60}
    with pytest.raises(UserError, match="crop_size"):
        parser.parse_args(["--crop_size", "0"])
