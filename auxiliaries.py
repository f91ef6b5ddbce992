"""What any training script needs: errors, flags, seeds, device, run folder and checkpoints.

Knows no data set, loss or metric, and imports no sibling.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import importlib.metadata
import itertools
import json
import math
import os
import pickle
import platform
import random
import re
import secrets
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from scipy.special import stdtrit

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither
    fcntl = resource = None  # type: ignore[assignment]

RUN_VERSION = 1  # of the files in a run folder; raised when older code can't go on with them


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


def number(
    kind: Callable[[str], Any], minimum: float, exclusive: bool = False, below: float = MAX_NUMBER
) -> Callable[[str], Any]:
    """An argparse type: a `kind` (int or float), at least `minimum` (above it, with `exclusive`) and below `below`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if value >= below:
            raise argparse.ArgumentTypeError(f"{text} is not below {below:g}")
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


def peak_memory(device: torch.device, reset: bool = False) -> float:
    """Peak memory in GiB: of tensors on a CUDA device since the last reset, or of this process on the CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return peak
    if resource is None:
        return math.nan
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def mean_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, standard deviation, and half the width of the mean's 95 % confidence interval by Student's t.

    The last two are NaN for one value.
    """
    count = len(values)
    if count < 2:
        return float(np.mean(values)), math.nan, math.nan
    deviation = float(np.std(values, ddof=1))
    return float(np.mean(values)), deviation, float(stdtrit(count - 1, 0.975)) * deviation / math.sqrt(count)


def plain(value: Any) -> Any:
    """`value` with everything in it turned into built-in Python types (tensors of state dicts stay tensors)."""
    if type(value) in (float, int, str, bool):
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str | torch.Tensor):
        return value
    return str(value)


def cure(error: Exception) -> str:
    """What to do about an error of the disk."""
    number = getattr(error, "errno", None)
    if number in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST):
        return "move away what stands in its place"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG):
        return "choose another place or name"
    return "make room, or choose another place"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which takes the place of `path` once the block ends without an error.

    Raises:
        UserError: the file can't be written; what stood at `path` is untouched.
    """
    beside = path.with_name(f".part-{secrets.token_hex(6)}-{path.name}")  # unique on a shared disk, too
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror or error}): {cure(error)}") from None
    finally:
        beside.unlink(missing_ok=True)


def check_run_folder(parent: Path, name: str) -> None:
    """Makes sure, before anything expensive, that `create_run_folder` can work.

    Raises:
        UserError: the name is no folder name, or nothing can be written where the folder would be.
    """
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"--savename '{name}' is no folder name: give a plain name, without slashes")
    try:
        existing = next(folder for folder in (parent, *parent.absolute().parents) if folder.exists())
    except OSError as error:
        raise UserError(f"{parent} can't be a folder ({error.strerror}): choose another --save_path") from None
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{existing} is no folder that can be written to: choose another --save_path")


def numbered(name: str) -> Iterator[str]:
    """The name, then `name_1`, `name_2`, …"""
    return (f"{name}_{number}" if number else name for number in itertools.count())


def create_run_folder(parent: Path, name: str, fill: Callable[[Path], object], may_be_numbered: bool = True) -> Path:
    """Makes `parent/name`, or `parent/name_1`, `_2`, … when that exists: a run folder is never overwritten.

    It appears with what `fill` puts into it, or not at all.

    Raises:
        UserError: it can't be made, or exists and must have this very name.
    """
    check_run_folder(parent, name)
    beside = parent / f".part-{secrets.token_hex(6)}-{name}"
    try:
        beside.mkdir(parents=True)
        fill(beside)
        for candidate in numbered(name) if may_be_numbered else [name]:
            folder = parent / candidate
            if not folder.exists():
                try:
                    os.rename(beside, folder)
                    break
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another process was quicker
                        raise
        else:
            raise UserError(f"{parent / name} exists: --resume_training goes on with it, or choose another --savename")
    except OSError as error:
        why = f"({error.strerror}): {cure(error)} (--save_path, --savename)"
        raise UserError(f"no run folder can be made in {parent} {why}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a run folder; the lock ends with this process, however that ends.

    Only one block at a time may hold it: to leave a block in a block gives the lock up.

    Raises:
        UserError: another process has it.
    """
    try:
        file = open(folder / ".lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{folder} can't be written to ({error.strerror})") from None
    with file:
        if fcntl is not None:
            try:
                # a record lock: unlike flock's, it is not handed down to data-loading workers, which may live longer
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"another process is at work in {folder}: wait for it, or stop it first") from None
        for unfinished in folder.glob(".part-*"):  # left by a process that was killed
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink(missing_ok=True)
        yield


def describe_environment(device: torch.device) -> dict[str, Any]:
    """The command line, the state of this repository, versions and hardware, as built-in types."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    def version(*packages: str) -> str | None:
        for package in packages:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                return importlib.metadata.version(package)
        return None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "version": RUN_VERSION,
        "command": sys.argv,
        "git commit": git("rev-parse", "HEAD"),
        "git tree is dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "faiss": version("faiss-gpu", "faiss-cpu"),
        "numpy": np.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
    }


def _processor() -> str:
    """The processor's name, with the number of cores that torch uses, on which sums depend in their last bits."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} threads"


def save_parameters(folder: Path, parameters: Mapping[str, Any]) -> None:
    """Writes hypa.pkl (a pickled dict of built-in types) and Parameter_Info.txt (the same, to read)."""
    values = plain(parameters)
    with replacing(folder / "hypa.pkl") as path:
        path.write_bytes(pickle.dumps(values))
    with replacing(folder / "Parameter_Info.txt") as path:
        path.write_text("".join(f"{name}: {value}\n" for name, value in sorted(values.items())), encoding="utf-8")


def save_json(path: Path, value: Any) -> None:
    """Writes plain values as JSON, to read."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_json(path: Path) -> Any:
    """Reads what `save_json` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): move it away") from None


def remove_file(path: Path) -> None:
    """Removes a file, if it is there.

    Raises:
        UserError: it can't be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} can't be removed ({error.strerror}): {cure(error)}") from None


def check_version(file: Path, values: Any) -> None:
    """Makes sure that a run folder's file, with these contents, isn't of a later version of this repository.

    Raises:
        UserError: it is, or it is damaged.
    """
    version = values.get("version") if isinstance(values, Mapping) else None
    if not isinstance(version, int):
        raise UserError(f"{file} is damaged: it doesn't say of which version it is")
    if version > RUN_VERSION:
        raise UserError(f"{file} is of a later version of this repository (run folders of version {version})")


def copy_file(source: Path, target: Path) -> None:
    """Copies a file so that a crash leaves either the old target or the new one."""
    with replacing(target) as beside:
        shutil.copyfile(source, beside)


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
            f"{path} is no whole checkpoint of tensors (cut off, or of another kind): put a whole one in its place"
        ) from None
