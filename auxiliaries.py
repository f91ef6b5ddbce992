"""What any training script needs: errors, flags, seeds, device, run folder, checkpoints, logs and plots.

Knows no data set, loss or metric, and imports no sibling.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import itertools
import math
import os
import pickle
import random
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from matplotlib import get_data_path
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps


class UserError(Exception):
    """What the user got wrong: one sentence that says what is wrong, where, and what to do."""


def notice(text: str) -> None:
    """Prints something the user should know but need not act on."""
    print(f"notice: {text}", file=sys.stderr, flush=True)


def run_command(command: Callable[[], object]) -> NoReturn:
    """Runs `command` as a program: a `UserError` becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; what was saved is kept", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def nearest_name(name: str, names: Iterable[str]) -> str:
    """` (did you mean …?)` with the most similar of `names`, or an empty string when none is similar."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


MAX_NUMBER = 1e15  # far beyond every flag, and within an int64


def number(kind: Callable[[str], Any], minimum: float, exclusive: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite `kind` (int or float) of at least `minimum` (or above it, with `exclusive`)."""

    def parse(text: str) -> Any:
        value = kind(text)
        if abs(value) > MAX_NUMBER:
            raise argparse.ArgumentTypeError(f"{text} is not below {MAX_NUMBER:g}")
        if math.isnan(value) or value < minimum or (exclusive and value == minimum):
            bound = f"above {minimum}" if exclusive else f"at least {minimum}"
            raise argparse.ArgumentTypeError(f"{text} is not {bound}")
        return value

    parse.__name__ = getattr(kind, "__name__", "number")  # argparse names the type in "invalid int value"
    return parse


class FrozenNamespace(argparse.Namespace):
    """Flags that can be read only."""

    def __init__(self, **values: Any):
        vars(self).update(values)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"the resolved flags are read-only: {name} can't be changed")

    def __delattr__(self, name: str) -> NoReturn:
        self.__setattr__(name, None)


class _ManualFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends each flag's default to its help, unless the help says in words what it depends on."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that raises `UserError` and names the nearest flag or choice."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=_ManualFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_args(self, args=None, namespace=None):
        opt, unknown = self.parse_known_args(args, namespace)
        if unknown:
            kind = "flag" if unknown[0].startswith("-") else "argument"
            near = nearest_name(unknown[0].split("=")[0], self.flags())
            raise UserError(f"unknown {kind} {unknown[0]}{near}: main.py --help lists all flags")
        return opt

    def flags(self) -> dict[str, argparse.Action]:
        """All flags, such as `--lr`, with their actions."""
        return self._option_string_actions

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            listed = f"; it takes one of {', '.join(choices)}" if len(choices) <= 12 else ""
            raise UserError(f"{action.option_strings[0]} {value} is unknown{nearest_name(str(value), choices)}{listed}")


def _seed_cpu(numbers: Sequence[int]) -> int:
    """Seeds Python, NumPy and torch's CPU generator from the numbers; returns torch's seed."""
    entropy = [len(numbers), *numbers]  # without their count, (1, 5) and (1, 5, 0) would give the same seeds
    for_random, for_numpy, *for_torch = np.random.SeedSequence(entropy).generate_state(4).tolist()
    random.seed(for_random)
    np.random.seed(for_numpy)
    torch_seed = for_torch[0] << 32 | for_torch[1]
    torch.default_generator.manual_seed(torch_seed)
    return torch_seed


def seed_everything(*numbers: int) -> None:
    """Seeds all generators (Python, NumPy, torch on CPU and CUDA) from non-negative numbers, e.g. (seed, epoch)."""
    torch.cuda.manual_seed_all(_seed_cpu(numbers))


_SPARE = np.random.MT19937(0)  # to make one takes longer than all the rest of `seeded`


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Inside the block the CPU generators are seeded from the numbers; after it they are as they were before."""
    of_python, of_numpy = random.getstate(), np.random.get_bit_generator()  # type: ignore[attr-defined]
    # To swap NumPy's generator is far quicker than to copy its state and back. A block in a block needs another.
    np.random.set_bit_generator(np.random.MT19937(0) if of_numpy is _SPARE else _SPARE)  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]):
        try:
            _seed_cpu(numbers)
            yield
        finally:
            random.setstate(of_python)
            np.random.set_bit_generator(of_numpy)  # type: ignore[attr-defined]


def pick_device(gpu: int) -> torch.device:
    """The CUDA device with that number, or the CPU for -1 and, with a notice, where there is no CUDA device.

    A CUDA device becomes the current one, and cuDNN is told to use deterministic algorithms.
    """
    if gpu < 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        notice("no CUDA device was found: running on the CPU")
        return torch.device("cpu")
    if gpu >= torch.cuda.device_count():
        raise UserError(
            f"--gpu {gpu} does not exist: this machine has CUDA devices 0 to {torch.cuda.device_count() - 1}"
        )
    torch.cuda.set_device(gpu)
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda", gpu)


def upload(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies host data to `device` without making the host wait for the device."""
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    # A copy from pageable memory may wait for the stream. Fake CUDA tensors exist without CUDA, pinned memory doesn't.
    if device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def cpu_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plain(value: Any) -> Any:
    """`value` with everything in it turned into built-in Python types (tensors of state dicts stay tensors)."""
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str | torch.Tensor):
        return value
    return str(value)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which takes the place of `path` once the block ends without an error.

    Raises:
        UserError: the file can't be written; what stood at `path` is untouched.
    """
    beside = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise UserError(
            f"{path} can't be written ({error.strerror or error}): make room, or choose another place"
        ) from None
    finally:
        beside.unlink(missing_ok=True)


def check_run_folder(parent: Path, name: str) -> None:
    """Makes sure, before anything expensive, that `create_run_folder` can work.

    Raises:
        UserError: the name is no folder name, or nothing can be written where the folder would be.
    """
    if name in ("", "..") or Path(name).name != name:
        raise UserError(f"--savename {name} is no folder name: leave out slashes")
    try:
        existing = next(folder for folder in (parent, *parent.absolute().parents) if folder.exists())
    except OSError as error:
        raise UserError(f"{parent} can't be a folder ({error.strerror}): choose another --save_path") from None
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{existing} is no folder that can be written to: choose another --save_path")


def create_run_folder(parent: Path, name: str) -> Path:
    """Makes `parent/name`, or `parent/name_1`, `_2`, … when that exists: a run folder is never overwritten.

    Raises:
        UserError: it can't be made.
    """
    check_run_folder(parent, name)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for attempt in itertools.count():
            folder = parent / (f"{name}_{attempt}" if attempt else name)
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise UserError(
            f"no run folder can be made in {parent} ({error.strerror}): choose another --save_path"
        ) from None
    raise AssertionError("there is always another number")


def save_parameters(folder: Path, parameters: Mapping[str, Any]) -> None:
    """Writes hypa.pkl (a pickled dict of built-in types) and Parameter_Info.txt (the same, to read)."""
    values = plain(parameters)
    with replacing(folder / "hypa.pkl") as path:
        path.write_bytes(pickle.dumps(values))
    with replacing(folder / "Parameter_Info.txt") as path:
        path.write_text("".join(f"{name}: {value}\n" for name, value in sorted(values.items())), encoding="utf-8")


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes state dicts and plain values so that a crash leaves either the old file or the new one."""
    with replacing(path) as beside:
        try:
            torch.save(plain(state), beside)
        except RuntimeError as error:  # so torch reports a full disk, or a folder that is gone
            raise OSError(str(error).splitlines()[0]) from None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads what `torch.save` wrote, tensors and built-in types only, onto the CPU.

    Raises:
        UserError: there is no such file, it is cut off, or it holds something other than tensors and plain values.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} can't be opened: {error.strerror or error}") from None
    except Exception:  # torch raises anything at all on a damaged file
        raise UserError(
            f"{path} is no whole checkpoint of tensors (cut off, or of another kind): fetch it again"
        ) from None


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Appends one row to a CSV file; the keys of the first row become its header."""
    try:
        with open(path, "a+", newline="", encoding="utf-8") as file:  # reads anywhere, writes at the end
            file.seek(0)
            header = next(csv.reader(file), None)
            writer = csv.DictWriter(file, fieldnames=header or list(row))
            if header is None:
                writer.writeheader()
            writer.writerow(row)
    except OSError as error:
        raise UserError(
            f"{path} can't be written ({error.strerror}): make room or choose another --save_path"
        ) from None


class GradientRecord:
    """Statistics of the embedding layer's gradient at every iteration, for --grad_measure.

    Of the gradient `(D, features)` it keeps mean and standard deviation over the D outputs, of the values and of
    their absolute values: four arrays `(iterations, features)`.
    """

    def __init__(self) -> None:
        self.arrays = {name: np.empty((0, 0), np.float32) for name in ("mean", "std", "abs_mean", "abs_std")}
        self._pending: list[torch.Tensor] = []  # on the device, so that no iteration waits for it

    def add(self, weight: torch.Tensor) -> None:
        """Takes the gradient that the layer's weight `(D, features)` has after an iteration's backward pass."""
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        values = torch.stack([gradient, gradient.abs()])  # (2, D, features)
        mean, std = values.mean(dim=1), values.std(dim=1, correction=0)
        self._pending.append(torch.stack([mean[0], std[0], mean[1], std[1]]))

    def save(self, path: Path) -> None:
        """Writes all iterations so far as a pickled dict of arrays."""
        if not self._pending:
            return
        recorded = torch.stack(self._pending, dim=1).cpu().numpy()  # (4, iterations, features)
        self._pending.clear()
        for name, rows in zip(self.arrays, recorded):
            self.arrays[name] = np.concatenate([self.arrays[name], rows]) if self.arrays[name].size else rows
        with replacing(path) as beside:
            beside.write_bytes(pickle.dumps(self.arrays))


def _family(name: str) -> str:
    """The metric without its set and its k: `Set 0 Recall @ 4` -> `Recall`."""
    return re.sub(r"^Set \d+ | @ \d+$", "", name)


def _wrapped(parts: Iterable[str], width: int) -> str:
    """The parts joined by wide gaps, broken into lines only between parts."""
    joined = "    ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)
    return textwrap.fill(joined, width, break_long_words=False, break_on_hyphens=False)


def save_info_plot(
    path: Path,
    train_rows: Sequence[Mapping[str, float]],
    val_rows: Sequence[Mapping[str, float]],
    selected_epoch: int,
    title: str,
) -> None:
    """Draws training loss and metrics over epochs, a panel for each kind of metric.

    Args:
        path: where to write the SVG.
        train_rows: rows with `Epochs` and `Train Loss`.
        val_rows: rows with `Epochs` and any number of metrics; `Time` is not drawn.
        selected_epoch: the epoch whose metrics, as one model's, stand in the header.
        title: the first line of the header.
    """
    metrics = [name for name in val_rows[0] if name not in ("Epochs", "Time")]
    families = list(dict.fromkeys(map(_family, metrics)))
    curves = {"Train Loss": [("Train Loss", train_rows)]} if train_rows else {}
    curves |= {family: [(name, val_rows) for name in metrics if _family(name) == family] for family in families}
    columns = min(len(curves), 2 if len(curves) in (2, 4) else 3)
    rows = math.ceil(len(curves) / columns)
    width = 5.5 * columns

    selected = next(row for row in val_rows if row["Epochs"] == selected_epoch)
    best = {name: max(val_rows, key=lambda row: row[name]) for name in metrics}
    header = _wrapped([f"{name} {selected[name]:.4f}" for name in metrics], int(13 * width))
    footer = _wrapped([f"{name} {best[name][name]:.4f} ({best[name]['Epochs']})" for name in metrics], int(15 * width))
    header = f"{title}\nselected epoch {selected_epoch}:\n{header}"
    footer = f"each metric's highest value (its epoch), not one model's:\n{footer}"
    margin = 0.2 * (header.count("\n") + footer.count("\n") + 2)

    figure = Figure(figsize=(width, 3.5 * rows + margin), layout="constrained")
    for number_, (family, lines) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(rows, columns, number_)
        for name, source in lines:
            epochs = [row["Epochs"] for row in source]
            axes.plot(epochs, [row[name] for row in source], marker="o" if len(epochs) < 30 else "", ms=3, label=name)
        axes.axvline(selected_epoch, color="0.6", linestyle=":", zorder=0)
        axes.set(title=family, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize="small", ncols=math.ceil(len(lines) / 8))
    figure.suptitle(header, fontsize="medium", parse_math=False)
    figure.supxlabel(footer, fontsize="small", parse_math=False)
    with replacing(path) as beside:
        figure.savefig(beside, format="svg")


def save_curve(path: Path, rows: Sequence[Mapping[str, float]], name: str) -> None:
    """Draws one column of the rows over `Epochs` into an SVG."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row["Epochs"] for row in rows], [row[name] for row in rows], marker="o", ms=3)
    axes.set(xlabel="epoch", title=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    with replacing(path) as beside:
        figure.savefig(beside, format="svg")


@dataclass(frozen=True)
class Retrieval:
    """A query and its nearest neighbours, ready to draw: images are `(H, W, 3)` uint8 arrays."""

    query: np.ndarray
    query_class: str
    neighbours: Sequence[np.ndarray]
    neighbour_classes: Sequence[str]
    correct: Sequence[bool]


def save_recoveries(path: Path, retrievals: Sequence[Retrieval]) -> None:
    """Draws each query (framed red) beside its nearest neighbours (green: right class; grey: wrong) into a PNG."""
    side, frame, caption, gap = 128, 5, 18, 6  # px
    cell = side + 2 * frame
    columns = 1 + max(len(retrieval.neighbours) for retrieval in retrievals)
    canvas = Image.new("RGB", (columns * (cell + gap) + gap, len(retrievals) * (cell + caption + gap) + 28), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 8), "query (red) and its nearest neighbours (green: right class, grey: wrong)", "black", _font(13))
    for row, retrieval in enumerate(retrievals):
        images = [retrieval.query, *retrieval.neighbours]
        names = [retrieval.query_class, *retrieval.neighbour_classes]
        colours = ["#d62728", *("#2ca02c" if right else "#b0b0b0" for right in retrieval.correct)]
        for column, (image, name, colour) in enumerate(zip(images, names, colours)):
            x, y = gap + column * (cell + gap), 28 + row * (cell + caption + gap)
            draw.text((x + cell // 2, y), _fitting(name.replace("_", " "), cell), "black", _font(11), anchor="ma")
            thumbnail = ImageOps.pad(Image.fromarray(image), (side, side), color="white")
            canvas.paste(ImageOps.expand(thumbnail, frame, colour), (x, y + caption))
    with replacing(path) as beside:
        canvas.save(beside, format="png")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(os.path.join(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _fitting(text: str, width: int) -> str:
    """The text, or as much of its beginning as fits into `width` px of a caption."""
    if _font(11).getlength(text) <= width:
        return text
    return next(cut for end in range(len(text), -1, -1) if _font(11).getlength(cut := text[:end] + "…") <= width)
