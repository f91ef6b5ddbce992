"""What any training script needs: errors, ranks, flag types, seeds, device, locks and atomic files.

Knows no dataset, loss or metric, and imports no sibling module.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import errno
import functools
import inspect
import itertools
import json
import math
import os
import random
import re
import secrets
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import typing
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither
    fcntl = resource = None  # type: ignore[assignment]


# Errors and messages


class UserError(Exception):
    """What the user got wrong: one sentence that says what is wrong, where, and what to do."""


COLORS = {"red": 31, "green": 32, "yellow": 33}  # and their codes of a terminal


def colored(text: str, color: str, stream: Any) -> str:
    """Text in a color where the stream is a terminal that shows it; elsewhere, or with NO_COLOR set, as it is."""
    is_shown = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\033[{COLORS[color]}m{text}\033[0m" if is_shown else text


def notice(text: str) -> None:
    """Prints something that the user should know but need not act on."""
    print(f"{colored('notice:', 'yellow', sys.stderr)} {text}", file=sys.stderr, flush=True)


def run_command(command: Callable[[], object], takes_ranks: bool = False) -> NoReturn:
    """Runs `command` as a program: a `UserError` becomes one line and exit code 2, Ctrl-C exit code 130.

    Text that the terminal can't show is escaped, and a reader that goes away, as in `| head`, stops nothing.

    Args:
        command: the program.
        takes_ranks: whether it can be started by torchrun as several processes, of which the first one prints.
    """
    sys.stdout, sys.stderr = SturdyStream(sys.stdout), SturdyStream(sys.stderr)
    terminal = sys.stderr
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as programs set it while modules load
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        start_ranks(takes_ranks)
        command()
        wait_for_ranks()
    except UserError as error:
        if _speaks_first():
            print(f"{colored('error:', 'red', terminal)} {error}", file=terminal, flush=True)
        code = 2
    except KeyboardInterrupt:
        print("\nstopped; what was saved is kept", file=sys.stderr)
        code = 130
    finally:
        sys.stderr = terminal  # for the traceback of a bug
    leave(code)


class SturdyStream:
    """A text stream that escapes what its encoding lacks, and drops what nobody reads any more."""

    def __init__(self, stream: Any):
        self._stream = stream
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._abandon()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._abandon()

    def _abandon(self) -> None:
        # The file descriptor goes to the null device, too: Python flushes the stream once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


# Ranks: the processes that make one run together, as torchrun starts them

RANKS_WAIT = timedelta(hours=2)  # for each other, as while the first one downloads; a process that died is noticed


@dataclass(frozen=True)
class Ranks:
    """This process among those that make a run together.

    Attributes:
        number: its rank, from 0.
        count: number of processes.
        local: its number among those of its machine, from 0.
        local_count: number of processes of its machine.
    """

    number: int = 0
    count: int = 1
    local: int = 0
    local_count: int = 1


_ranks = Ranks()
_store: Any = None  # what all ranks can read and write
_is_alone = False  # whether the first rank does something that the others only wait for


def ranks() -> Ranks:
    """This process among those that make a run together; by default it is alone."""
    return _ranks


def start_ranks(takes_ranks: bool = True) -> None:
    """Joins the other processes, where torchrun started several. From then on only the first one prints and writes.

    Raises:
        UserError: the program can't be started by torchrun, or the others can't be reached.
    """
    global _ranks, _store
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "LOCAL_RANK" not in os.environ:
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    joined = Ranks(*(int(os.environ[name]) for name in names))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    with _together():
        _store, *_ = next(dist.rendezvous("env://", timeout=RANKS_WAIT))
        if not takes_ranks:
            raise UserError(f"{Path(sys.argv[0]).name} is not made for torchrun, which main.py is: start it by python")
        store = dist.PrefixStore("ranks", _store)
        dist.init_process_group(backend, store=store, rank=joined.number, world_size=joined.count, timeout=RANKS_WAIT)
    _ranks = joined
    if joined.number:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the end)


def leave(code: int) -> NoReturn:
    """Ends the process; one of several at once, since an ordinary end can't cope with the threads of their group."""
    if _ranks.count > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _speaks_first() -> bool:
    """Whether no other rank has told yet why the run ends: most errors are met by all of them."""
    if _store is None:
        return True
    try:
        return _store.add("told", 1) == 1
    except RuntimeError:  # it is gone
        return _ranks.number == 0


@contextmanager
def _together() -> Iterator[None]:
    """What goes wrong inside the block goes wrong because another rank ended."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"another process of this run ended, or can't be reached ({reason(error)}): see what it says, and continue "
            "with --resume_training"
        ) from None


def is_first_rank() -> bool:
    """Whether this is the process that prints and writes."""
    return _ranks.number == 0


def wait_for_ranks() -> None:
    """Returns once all ranks are here."""
    if _ranks.count > 1:
        with _together():
            dist.all_reduce(torch.zeros(1))


def from_first_rank(value: Any) -> Any:
    """The first rank's value, on all ranks."""
    if _ranks.count == 1:
        return value
    values = [value]
    with _together():
        dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


Function = TypeVar("Function", bound=Callable[..., Any])


def by_first_rank(function: Function) -> Function:
    """Makes a function one that the first rank alone calls, once all ranks have arrived there.

    All of them return what it returned, or raise the `UserError` that it raised. So what depends on the disk, which the
    first rank writes to, is decided in one place.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        global _is_alone
        if _ranks.count == 1 or _is_alone:
            return function(*args, **kwargs)
        wait_for_ranks()
        value = error = None
        if is_first_rank():
            _is_alone = True
            try:
                value = function(*args, **kwargs)
            except UserError as raised:
                error = raised
            finally:
                _is_alone = False
        value, error = from_first_rank((value, error))
        if error is not None:
            raise error
        return value

    return cast(Function, call)


@contextmanager
def first_rank_first() -> Iterator[None]:
    """All ranks go through the block, the first one before the others, as where it downloads what they then find."""
    if not is_first_rank():
        wait_for_ranks()
    yield
    if is_first_rank():
        wait_for_ranks()


def share(count: int) -> slice:
    """Which of `count` things are this rank's: as many as the other ranks have, or one more or less."""
    return slice(*(number * count // _ranks.count for number in (_ranks.number, _ranks.number + 1)))


class _GatheredRows(torch.autograd.Function):
    """The rows of all ranks; each rank takes its own part of the gradient back, since all compute the same loss."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, count: int) -> torch.Tensor:
        ctx.own = share(count)
        longest = -(-count // _ranks.count)
        padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
        parts = [torch.empty_like(padded) for _ in range(_ranks.count)]
        with _together():
            dist.all_gather(parts, padded)
        sizes = [(number + 1) * count // _ranks.count - number * count // _ranks.count for number in range(len(parts))]
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0][ctx.own], None


def gather_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """All `count` rows, of which each rank has its `share`; each computes the whole loss, and gets its gradient."""
    return rows if _ranks.count == 1 else _GatheredRows.apply(rows, count)


def _all_in_one(tensors: Iterable[torch.Tensor], exchange: Callable[[torch.Tensor], object]) -> None:
    """Exchanges tensors between ranks, those of a kind as one."""
    by_kind: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in by_kind.values():
        joined = torch.cat([tensor.reshape(-1) for tensor in group])
        with _together():
            exchange(joined)
        for tensor, part in zip(group, joined.split([tensor.numel() for tensor in group])):
            tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def sum_gradients(parameters: Iterable[torch.Tensor], of_shares: Collection[int]) -> None:
    """Makes the gradients the same on all ranks.

    Args:
        parameters: all that learn.
        of_shares: the ids of those whose gradient on a rank is that of the rank's images: it becomes the sum over
            ranks. The others' gradients are of the whole batch on every rank already; they become those of the first
            rank, so that errors of rounding don't drive the ranks apart.
    """
    if _ranks.count == 1:
        return
    learning = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in learning if parameter.grad is not None]
    for parameter, gradient in zip(learning, gradients):
        if id(parameter) not in of_shares and not is_first_rank():
            gradient.zero_()
    _all_in_one(gradients, dist.all_reduce)


@torch.no_grad()
def copy_from_first_rank(tensors: Iterable[torch.Tensor]) -> None:
    """Makes tensors those of the first rank."""
    if _ranks.count > 1:
        _all_in_one(tensors, lambda joined: dist.broadcast(joined, 0))


@contextmanager
def drawing_apart(position: int, device: torch.device) -> Iterator[None]:
    """Inside the block each rank draws other random numbers; after it all go on with the same ones, as before it.

    Args:
        position: counts the blocks since the generators were seeded.
        device: where numbers are drawn.
    """
    if _ranks.count == 1:
        yield
        return
    entropy = [torch.initial_seed(), position, _ranks.number]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
        yield


MAX_NAME = 255  # bytes of a file's name
MAX_SHOWN = 60  # characters of what the user typed
MAX_REASON = 200  # characters of what a library says
MAX_LISTED = 16  # names in a message


def shorten(text: str) -> str:
    """Text cut to what messages show of it."""
    return f"{text[:MAX_SHOWN]}…" if len(text) > MAX_SHOWN else text


def shown(value: Any) -> str:
    """A value as messages show it: not too long, and in quotes where it could be overlooked or isn't printable."""
    text = shorten(str(value))
    return text if text.isprintable() and text.strip() == text != "" else repr(text)


def counted(number: int, one: str, several: str | None = None) -> str:
    """A number of things, such as `1 image` or `2,000 images`; `several` is the plural where it doesn't end in s."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def reason(error: Exception) -> str:
    """What a library says of an error, in one line."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return f"{text[:MAX_REASON]}…" if len(text) > MAX_REASON else text


def nearest_name(name: str, names: Iterable[str], cutoff: float = 0.7) -> str:
    """` (did you mean …?)` with the most similar of `names`, or an empty string when none is similar enough."""
    by_lower_case = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=cutoff)
    return f" (did you mean {by_lower_case[close[0]]}?)" if close else ""


def disk_advice(error: Exception) -> str:
    """What to do about an error of the disk."""
    number = getattr(error, "errno", None)
    if number in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST):
        return "move away what stands in its place"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EILSEQ):
        return "choose another place or name"
    if number == errno.ENOENT:
        return "make its folder first, or choose another place"
    if number in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # torch doesn't say which error it was
        return "free some space, or choose another place"
    return "see to the disk, or choose another place"


PLAIN_LINE_EVERY = 30  # seconds


class Progress:
    """Goes through `batches` with a progress bar; without a terminal, with a plain line every half minute.

    Attributes:
        note: what stands behind the counts.
    """

    def __init__(self, batches: Iterable[Any], name: str, clock: Callable[[], float] = time.monotonic):
        self.bar = tqdm(batches, desc=name, leave=False, disable=None)
        self.name, self.clock, self.note = name, clock, ""

    def __iter__(self) -> Iterator[Any]:
        shown = self.clock()
        for done, batch in enumerate(self.bar, start=1):
            yield batch
            if self.bar.disable and self.clock() - shown >= PLAIN_LINE_EVERY:
                shown = self.clock()
                note = self.note and f", {self.note}"
                print(f"{self.name}: {done} of {self.bar.total}{note}", file=sys.stderr, flush=True)

    def show(self, note: str) -> None:
        """Changes the note."""
        self.note = note
        self.bar.set_postfix_str(note)


# Flags

MAX_NUMBER = 1e15  # far beyond every flag, and within an int64
OVERRIDE = "~OVERRIDE~"
UNSET: Any = object()  # stands for a flag that nobody gave
TUNING_KINDS = ("BAYESIAN", "LOG_BAYESIAN", "INT_BAYESIAN", "CHOICE")


@dataclass(frozen=True)
class Tuned:
    """Stands for a value that tune.py searches for.

    Attributes:
        kind: one of `TUNING_KINDS`.
        values: bounds or choices, as the user typed them.
    """

    kind: str
    values: tuple[str, ...]


def split_suffix(name: str) -> tuple[str, str]:
    """A flag or key and what is tuned about it: `lr~BAYESIAN~` -> `lr`, `BAYESIAN`; without a suffix `lr`, ``."""
    match = re.fullmatch(r"(.*[^~])~(\w*)~", name)
    return (match[1], match[2]) if match and f"~{match[2]}~" != OVERRIDE else (name, "")


def read_tuned(name: str, values: Sequence[str]) -> Tuned:
    """What tune.py is to search for.

    Args:
        name: flag or key with the suffix, as the user typed it.
        values: bounds or choices; or a single text that lists them in brackets.

    Raises:
        UserError: there is no such suffix, or the text is not such a list.
    """
    _, kind = split_suffix(name)
    if kind not in TUNING_KINDS:
        near = nearest_name(kind, TUNING_KINDS)
        listed = ", ".join(f"~{known}~" for known in TUNING_KINDS)
        raise UserError(f"{shown(name)} has an unknown suffix ~{kind}~{near}; there are {listed}")
    if len(values) == 1 and values[0].startswith("["):
        import yaml

        try:
            entries = yaml.load(values[0], yaml.BaseLoader)
        except (yaml.YAMLError, RecursionError):
            raise UserError(f"{shown(name)} takes a list such as [0.01,100], not {shown(values[0])}") from None
        values = [entry if isinstance(entry, str) else json.dumps(entry).replace('"', "") for entry in entries]
    return Tuned(kind, tuple(values))


def number(
    kind: Callable[[str], Any], minimum: float, exclusive: bool = False, below: float = MAX_NUMBER
) -> Callable[[str], Any]:
    """An argparse type: a `kind` (int or float), at least `minimum` (above it, with `exclusive`) and below `below`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            name = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{shown(text)} is not {name}") from None
        if value >= below:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not below {below:g}")
        if math.isnan(value) or value < minimum or (exclusive and value == minimum):
            bound = f"above {minimum}" if exclusive else f"at least {minimum}"
            raise argparse.ArgumentTypeError(f"{shown(text)} is not {bound}")
        return value

    return parse


def user_path(text: str) -> str:
    """An argparse type: a path, in which a leading `~` stands for the home folder."""
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a path: it has a NUL character")
    if any(len(name.encode(errors="replace")) > MAX_NAME for name in Path(text).parts):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a path: a name in it is longer than {MAX_NAME} bytes")
    return os.path.expanduser(text)


def parse_value(text: str) -> Any:
    """A parameter's value from what the user typed: a number, true, false, null, a list of these, or text."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    import yaml

    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        return text
    if isinstance(value, list):
        return [parse_value(entry) if isinstance(entry, str) else entry for entry in value]
    return value if value is None or isinstance(value, bool) else text


def check_params(
    flag: str, params: Mapping[str, str], target: Callable[..., Any], reserved: Collection[str] = ()
) -> dict[str, Any]:
    """Checks `key=value` parameters against the signature of what they go to.

    Args:
        flag: where they were given, such as `--loss_params`.
        params: the parameters as the user typed them.
        target: the class or function that takes them.
        reserved: its parameters that are filled in by other flags or by the run.

    Returns:
        The parameters with typed values.

    Raises:
        UserError: `target` has no such parameter (the nearest one is named), or it takes another type.
    """
    name = target.__name__
    known = {key: one for key, one in _signature(target).items() if key not in reserved}
    values = {}
    for key, text in params.items():
        if key not in known:
            listed = f"; it takes {', '.join(known)}" if known else "; it takes none"
            raise UserError(f"{flag}: {name} has no parameter {shown(key)}{nearest_name(key, known)}{listed}")
        wanted = _expected_type(known[key])
        values[key] = text if wanted is str else parse_value(text)
        if wanted and not _has_type(values[key], wanted):
            raise UserError(f"{flag}: {key} of {name} takes {TYPE_NAMES[wanted]}, not {shown(text)}")
    return values


TYPE_NAMES: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "text", list: "a list"}


def _signature(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The named parameters of a function, or of a class and those of its bases that it passes keywords on to."""
    parameters: dict[str, inspect.Parameter] = {}
    for owner in getattr(target, "__mro__", [target]):
        if owner is object or (isinstance(owner, type) and "__init__" not in vars(owner)):
            continue
        own = inspect.signature(vars(owner)["__init__"] if isinstance(owner, type) else owner).parameters
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters |= {k: p for k, p in own.items() if p.kind in named and k not in ("self", *parameters)}
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own.values()):
            break
    return parameters


def _expected_type(parameter: inspect.Parameter) -> type | None:
    """The type that a parameter takes, by its annotation or else its default; None where neither says."""
    hints = {"int": int, "float": float, "bool": bool, "str": str}
    annotation = getattr(parameter.annotation, "__name__", parameter.annotation)
    if annotation in hints:
        return hints[annotation]
    kinds = [typing.get_origin(kind) or kind for kind in typing.get_args(parameter.annotation)]
    if any(kind in (Sequence, list, tuple) for kind in kinds):  # one value or several: the default says too little
        return None
    default = parameter.default
    if isinstance(default, tuple):
        return list
    kind: type = float if type(default) is int else type(default)  # a default of 2 doesn't mean that 2.5 is wrong
    return kind if kind in TYPE_NAMES else None


def _has_type(value: Any, wanted: type) -> bool:
    return type(value) in ((int, float) if wanted is float else (wanted,))


class FrozenNamespace(argparse.Namespace):
    """Flags that can only be read."""

    def __init__(self, **values: Any):
        vars(self).update(values)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"the resolved flags are read-only: {name} can't be changed")

    def __delattr__(self, name: str) -> NoReturn:
        self.__setattr__(name, None)


@dataclass(frozen=True)
class FlagTraits:
    """What else is known of a flag, beside what argparse needs.

    Attributes:
        fixed: it must stay the same when a run is resumed.
        machine: it says where a run is made, not what the run is.
        compared: runs that differ in it are runs of different configurations.
        protocol: it says on which classes, or how, networks are scored, not what they are.
        stored: it is part of a run's configuration.
        needs: what must be asked for beside it: "evaluate", "cross_validation", or another flag.
    """

    fixed: bool = False
    machine: bool = False
    compared: bool = True
    protocol: bool = False
    stored: bool = True
    needs: str | None = None


class FlagGroup(argparse._ArgumentGroup):
    """A group of flags; `add_argument` also takes the `FlagTraits` of a flag, and the group those of all its flags."""

    def __init__(self, container: Any, title: str, **traits: Any):
        super().__init__(container, title)
        self.parser, self.common_traits = container, traits

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        traits = {name: kwargs.pop(name) for name in FlagTraits.__dataclass_fields__ if name in kwargs}
        action = super().add_argument(*names, **kwargs)
        self.parser.traits[action.dest] = FlagTraits(**{**self.common_traits, **traits})
        return action


class SwitchAction(argparse.Action):
    """A flag that is on or off: `--name` and `--no-name`; for `--not_name` the opposite is `--name`."""

    def __init__(self, option_strings: Sequence[str], dest: str, default: bool | None = False, **kwargs: Any):
        (flag,) = option_strings
        name = flag.removeprefix("--")
        opposite = f"--{name.removeprefix('not_')}" if name.startswith("not_") else f"--no-{name}"
        super().__init__([flag, opposite], dest, nargs=0, default=default, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


class MappingAction(argparse.Action):
    """A flag of `key=value …`, which merges key by key with what earlier layers gave.

    With the suffix `~OVERRIDE~` on the flag it replaces what they gave. Where the parser `tunes`, a key with a suffix
    such as `~BAYESIAN~` gives a `Tuned`.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        names = [name for option in option_strings for name in (option, option + OVERRIDE)]
        super().__init__(names, dest, nargs="*", metavar="key=value", **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        before = self.default if before is UNSET else before
        merged = {} if str(option_string).endswith(OVERRIDE) else dict(before or {})
        for entry in values:
            key, equals, value = entry.partition("=")
            if not equals or not key:
                raise UserError(f"{option_string} {shown(entry)} is not of the form key=value")
            plain, kind = split_suffix(key)
            if kind and not parser.tunes:
                raise UserError(f"{option_string} {shown(key)} {FOR_TUNE}")
            merged[plain] = read_tuned(f"{option_string} {key}", [value]) if kind else value
        setattr(namespace, self.dest, merged)


FOR_TUNE = "has a suffix for tune.py, which searches for the best value: give it to python tune.py, or a plain value"


class TunedAction(argparse.Action):
    """A flag with a suffix such as `~BAYESIAN~`, which takes the place of the plain flag with a `Tuned`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, read_tuned(str(option_string), values))


class NamesAction(argparse.Action):
    """A flag of one name, which is stored as text, or of several, which are stored as a list."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, dest, nargs="+", **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


class _ManualFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends each flag's default, as a user would type it, to its help, unless the help says what it depends on.

    Of a description it keeps empty lines, and lines that are indented, such as commands.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled = []
        for is_prose, lines in itertools.groupby(text.strip().splitlines(), lambda line: line[:1].strip() != ""):
            block = list(lines)
            filled += [super()._fill_text(" ".join(block), width, indent)] if is_prose else [indent + x for x in block]
        return "\n".join(filled)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, [], {}) or "(default:" in str(action.help):
            return action.help
        if isinstance(action.default, list) and "%(default)" not in str(action.help):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        if action.default is True:
            return f"{action.help} (default: on)"
        return super()._get_help_string(action)


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that raises `UserError` and names the nearest flag or choice.

    Attributes:
        traits: the `FlagTraits` of every flag, by its name in the namespace.
        known_elsewhere: names that other projects give to some flags, and these flags.
        tunes: whether it takes the suffixes of `TUNING_KINDS`.
    """

    def __init__(self, known_elsewhere: Mapping[str, str] | None = None, tunes: bool = False, **kwargs: Any):
        self.traits: dict[str, FlagTraits] = {}
        self.tunes = tunes
        self.known_elsewhere = known_elsewhere or {}
        super().__init__(formatter_class=_ManualFormatter, allow_abbrev=False, **kwargs)
        self.register("action", "switch", SwitchAction)
        self.register("action", "params", MappingAction)
        self.register("action", "names", NamesAction)

    def add_argument_group(self, title: str, **traits: Any) -> FlagGroup:  # type: ignore[override]
        """A titled group of flags; `traits` are `FlagTraits` that all of them have."""
        group = FlagGroup(self, title, **traits)
        self._action_groups.append(group)
        return group

    def list_first(self, *titles: str) -> None:
        """Lets the help begin with some groups of flags; in all else the order of declaration stays."""
        first = [self._positionals, self._optionals]
        self._action_groups.sort(key=lambda group: group not in first and group.title not in titles)

    def names_with(self, **traits: Any) -> list[str]:
        """The flags whose `FlagTraits` have these values, in order of declaration."""
        wanted = traits.items()
        return [name for name, known in self.traits.items() if wanted <= vars(known).items()]

    def error(self, message: str) -> NoReturn:
        switch = re.match(r"argument (\S+): ignored explicit argument", message)
        if switch:
            on, *off = switch[1].split("/")
            raise UserError(f"{on} takes no value: give {' or '.join([on, *off])}")
        raise UserError(message.removeprefix("argument "))

    def _get_values(self, action, arg_strings):
        if "--" in arg_strings and action.option_strings:  # argparse would drop it
            raise UserError(f"{action.option_strings[0]} takes a value, not --")
        return super()._get_values(action, arg_strings)

    def parse_args(self, args=None, namespace=None):
        opt, unknown = self.parse_known_args(args, namespace)
        self.refuse_unknown(unknown)
        return opt

    def refuse_unknown(self, unknown: Sequence[str]) -> None:
        """Raises a `UserError` of the first of the arguments that are left over, if there are any."""
        if not unknown:
            return
        if split_suffix(unknown[0].split("=")[0])[1]:
            raise self.refuse_suffix(unknown[0].split("=")[0])
        kind = "flag" if unknown[0].startswith("-") else "argument"
        near = self.nearest_flag(unknown[0].split("=")[0])
        raise UserError(f"unknown {kind} {shown(unknown[0])}{near}: {self.prog} --help lists all flags")

    def take_suffixes(self) -> None:
        """Lets the flags of a run's configuration have the suffixes of `TUNING_KINDS`."""
        for name in self.names_with(stored=True):
            flag = f"--{name}"
            known = self.flags().get(flag)
            if known is not None and not isinstance(known, MappingAction):
                options = [f"{flag}~{kind}~" for kind in TUNING_KINDS]
                self.add_argument(*options, dest=name, action=TunedAction, nargs="*", help=argparse.SUPPRESS)

    def refuse_suffix(self, flag: str) -> UserError:
        """What is wrong with an unknown flag that has a suffix."""
        plain = split_suffix(flag)[0]
        if plain not in self.flags():
            near = self.nearest_flag(plain)
            return UserError(f"unknown flag {shown(plain)}{near}: {self.prog} --help lists all flags")
        if not self.tunes:
            return UserError(f"{shown(flag)} {FOR_TUNE}")
        if isinstance(self.flags()[plain], MappingAction):
            return UserError(f'{plain}: the suffix goes to a key of it, such as {plain} "key~BAYESIAN~=[0.1,1]"')
        read_tuned(flag, ())
        return UserError(f"{plain} can't be tuned")

    def nearest_flag(self, flag: str) -> str:
        """` (did you mean …?)` with the flag that other projects call so, or the most similar one."""
        name = flag.lstrip("-").replace("-", "_")
        known = self.known_elsewhere.get(name.lower())
        if known:
            return f" (did you mean {known}?)"
        return nearest_name(name, (known.lstrip("-") for known in self.flags())).replace("mean ", "mean --")

    def flags(self) -> dict[str, argparse.Action]:
        """All flags, such as `--lr`, with their actions."""
        return self._option_string_actions

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            listed = f"; it takes one of {', '.join(choices)}" if len(choices) <= MAX_LISTED else ""
            near = nearest_name(str(value), choices)
            name = action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)
            raise UserError(f"{name} {shown(value)} is unknown{near}{listed}")


class CommandParser(FlagParser):
    """The parser of one command among several, which `add_subparsers(parser_class=CommandParser)` makes.

    What it doesn't know is an error of its own, which names the nearest of its flags.
    """

    def parse_known_args(self, args=None, namespace=None):
        known = self.flags()
        self.refuse_unknown([arg for arg in args if arg.startswith("--") and arg.partition("=")[0] not in known])
        opt, unknown = super().parse_known_args(args, namespace)
        self.refuse_unknown(unknown)
        return opt, unknown


# Seeds and device


def _seed_cpu(numbers: Sequence[int]) -> int:
    """Seeds the generators of Python, NumPy and torch's CPU from the numbers; returns torch's seed."""
    entropy = [len(numbers), *numbers]  # without their count, (1, 5) and (1, 5, 0) would give the same seeds
    python_seed, numpy_seed, *torch_seeds = np.random.SeedSequence(entropy).generate_state(4).tolist()
    random.seed(python_seed)
    np.random.seed(numpy_seed)
    torch_seed = torch_seeds[0] << 32 | torch_seeds[1]
    torch.default_generator.manual_seed(torch_seed)
    return torch_seed


def seed_everything(*numbers: int) -> None:
    """Seeds all generators (Python, NumPy, torch on CPU and CUDA) from non-negative numbers, e.g. (seed, epoch)."""
    torch.cuda.manual_seed_all(_seed_cpu(numbers))


_SPARE = np.random.MT19937(0)  # creating one takes longer than all the rest of `seeded`


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Inside the block the CPU generators are seeded from the numbers; after it they are as they were before."""
    python_state, numpy_generator = random.getstate(), np.random.get_bit_generator()  # type: ignore[attr-defined]
    # Swapping NumPy's generator is far quicker than copying its state and back. A nested block needs another one.
    spare = np.random.MT19937(0) if numpy_generator is _SPARE else _SPARE
    np.random.set_bit_generator(spare)  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]):
        try:
            _seed_cpu(numbers)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_bit_generator(numpy_generator)  # type: ignore[attr-defined]


def find_device(gpu: int) -> torch.device:
    """The CUDA device with that number, or the CPU for -1 and where there is no CUDA device.

    Of several ranks on a machine, the first one has that device, and the others those after it.
    """
    if gpu < 0 or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", gpu + _ranks.local)


def pick_device(gpu: int, deterministic: bool = True) -> torch.device:
    """`find_device`, prepared for use; a notice says when the CPU stands in for a CUDA device.

    A CUDA device becomes the current one, and cuDNN is told to use deterministic algorithms, or else the quickest ones.
    On the CPU some cores are left to data-loading workers; the number of threads, on which the last bits of sums
    depend, follows from the machine alone, not from --kernels.

    Raises:
        UserError: there are CUDA devices, but none with that number.
    """
    device = find_device(gpu)
    if device.type == "cpu":
        if gpu >= 0:
            notice("no CUDA device was found: running on the CPU")
        torch.set_num_threads(cpu_cores() - cpu_cores() // 4)
        keep_freed_memory()
        return device
    last = torch.cuda.device_count() - 1
    if gpu > last:
        raise UserError(f"--gpu {gpu} does not exist: this machine has CUDA devices 0 to {last}")
    if gpu + _ranks.local > last:
        raise UserError(
            f"{_ranks.local_count} processes on this machine need a CUDA device each, from --gpu {gpu} on, and the "
            f"last one is {last}: give torchrun --nproc_per_node {last + 1 - gpu}"
        )
    torch.cuda.set_device(device)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, not deterministic
    return device


def keep_freed_memory() -> None:
    """Makes the C library keep freed memory for later.

    A step on the CPU frees gigabytes of activations: to hand them back to the system, which clears them anew for the
    next step, can take longer than to compute them.
    """
    mmap_max, trim_threshold = -4, -1  # parameters of glibc's mallopt
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def upload(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies host data to `device` without making the host wait for the device."""
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    if tensor.device == device:
        return tensor
    # A copy from pageable memory may wait for the stream. Fake CUDA tensors exist without CUDA, pinned memory doesn't.
    if device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def cpu_cores() -> int:
    """The number of cores that this process may use, by its affinity and its control group's quota.

    Ranks on one machine share them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores // _ranks.local_count)


def default_workers(device: torch.device) -> int:
    """Number of data-loading workers: one per core beside a CUDA device; a quarter of the cores where they train."""
    return min(8, cpu_cores() if device.type == "cuda" else cpu_cores() // 4)


def peak_memory(device: torch.device, reset: bool = False) -> float:
    """Peak memory in GiB: of tensors on a CUDA device since the last reset, or of this process on the CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return peak
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status", "rb") as lines:
        return int(next(line for line in lines if line.startswith(b"VmHWM:")).split()[1]) / 2**20  # of KiB
    # elsewhere; on Linux, this number begins with the peak of the process that started this one
    if resource is None:
        return math.nan
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def check_memory(needed: float, what: str) -> None:
    """Makes sure, before anything is allocated, that this machine has that many bytes at all.

    Args:
        needed: bytes.
        what: the flag and its value that ask for them.

    Raises:
        UserError: it hasn't.
    """
    if not hasattr(os, "sysconf"):  # Windows
        return
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > total:
        raise UserError(
            f"{what} would take {needed / 2**30:,.0f} GiB of memory, and this machine has {total / 2**30:.0f}: lower it"
        )


def mean_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, standard deviation, and half the width of the mean's 95 % confidence interval by Student's t.

    The last two are NaN for a single value.
    """
    from scipy.special import stdtrit

    count = len(values)
    if count < 2:
        return float(np.mean(values)), math.nan, math.nan
    deviation = float(np.std(values, ddof=1))
    return float(np.mean(values)), deviation, float(stdtrit(count - 1, 0.975)) * deviation / math.sqrt(count)


def to_builtin(value: Any) -> Any:
    """`value` with everything in it turned into built-in Python types; tensors stay tensors."""
    if type(value) in (float, int, str, bool):
        return value
    if isinstance(value, Mapping):
        return {to_builtin(key): to_builtin(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_builtin(entry) for entry in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str | torch.Tensor):
        return value
    return str(value)


# Files


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which takes the place of `path` once the block ends without an error.

    Of several ranks, the first one writes it; what another writes is thrown away.

    Raises:
        UserError: the file can't be written; what stood at `path` is untouched.
    """
    if not is_first_rank():
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
        return
    beside = path.with_name(f".part-{secrets.token_hex(6)}-{path.name}")  # unique on a shared disk, too
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror or error}): {disk_advice(error)}") from None
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, name: str = ".lock", wait: bool = False) -> Iterator[None]:
    """Keeps other processes out of a folder; the lock ends with this process, however that ends.

    A process holds it once: leaving a block inside a block gives the lock up. Of several ranks, the first one has it.

    Args:
        folder: an existing folder.
        name: the lock's file; the default one also removes what a process that was killed left half written.
        wait: whether to wait for the other process.

    Raises:
        UserError: another process has it, or the folder can't be written to.
    """
    if not is_first_rank():
        yield
        return
    try:
        file = open(folder / name, "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{folder} can't be written to ({error.strerror}): {disk_advice(error)}") from None
    with file:
        if fcntl is not None:
            try:
                # A record lock: unlike flock's, data-loading workers, which may live longer, don't inherit it.
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError:
                raise UserError(f"another process is using {folder}: wait for it, or stop it first") from None
        for unfinished in folder.glob(".part-*") if name == ".lock" else ():
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink(missing_ok=True)
        yield


def check_schema(file: Path, value: Any, schema: Mapping[str, Any], advice: str) -> None:
    """Makes sure that what was read from a file is what a JSON schema says.

    Args:
        file: where it was read from.
        value: what was read.
        schema: see json-schema.org.
        advice: what to do when it isn't.

    Raises:
        UserError: it isn't, with the place in the file.
    """
    import jsonschema

    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(value))
    if error is None:
        return
    place = error.json_path.removeprefix("$").lstrip(".") or "it"
    problem = error.message
    if error.validator == "required":
        problem = f"lacks {next(name for name in error.validator_value if name not in error.instance)}"
    elif error.validator == "type":
        kinds = [error.validator_value] if isinstance(error.validator_value, str) else error.validator_value
        problem = f"is not {' or '.join(SCHEMA_TYPES[kind] for kind in kinds)}"
    raise UserError(f"{file} is damaged ({place} {textwrap.shorten(problem, 150)}): {advice}")


SCHEMA_TYPES = {
    **{"object": "a mapping", "array": "a list", "integer": "an integer", "number": "a number", "string": "text"},
    **{"boolean": "true or false", "null": "null"},
}


def as_json(value: Any) -> str:
    """Plain values as JSON, indented; NaN and the infinities, which JSON doesn't have, become null."""

    def without_nan(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without_nan(entry) for name, entry in value.items()}
        if isinstance(value, list):
            return [without_nan(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(without_nan(to_builtin(value)), indent=1, ensure_ascii=False, allow_nan=False)


def save_json(path: Path, value: Any) -> None:
    """Writes plain values as JSON, see `as_json`."""
    with atomic_write(path) as beside:
        beside.write_text(f"{as_json(value)}\n", encoding="utf-8")


def load_json(path: Path) -> Any:
    """Reads what `save_json` wrote; what it wrote as null is None.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): move it away") from None


def remove_file(path: Path) -> None:
    """Removes a file, if it is there.

    Raises:
        UserError: it can't be removed.
    """
    if not is_first_rank():
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} can't be removed ({error.strerror}): {disk_advice(error)}") from None


def remove_folder(path: Path) -> None:
    """Removes a folder with all that is in it, as far as it is there and can be removed."""
    if is_first_rank():
        shutil.rmtree(path, ignore_errors=True)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file so that a crash leaves either the old target or the new one."""
    with atomic_write(target) as beside:
        shutil.copyfile(source, beside)


def link_file(source: Path, target: Path) -> None:
    """Like `copy_file`, of a file that is replaced but never changed: no content is written where disks have links."""
    with atomic_write(target) as beside:
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes state dicts and plain values so that a crash leaves either the old file or the new one."""
    with atomic_write(path) as beside:
        try:
            torch.save(to_builtin(state), beside)
        except RuntimeError as error:  # how torch reports a full disk, or a folder that is gone
            raise OSError(str(error).splitlines()[0]) from None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads what `torch.save` wrote, tensors and built-in types only, onto the CPU.

    Raises:
        UserError: there is no such file, it is incomplete or corrupt (a single flipped bit is found), or it holds
            something other than tensors and plain values.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:  # torch.load itself ignores the checksums
                        raise ValueError("wrong checksum")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} can't be opened: {error.strerror or error}") from None
    except Exception:  # torch raises anything at all on a damaged file
        raise UserError(
            f"{path} is incomplete or corrupt, or not a checkpoint of tensors: replace it with an intact one"
        ) from None
