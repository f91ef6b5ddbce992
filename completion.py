"""Completes flags and their values in a shell, without importing torch: what argcomplete asks each command for.

A command calls `complete` before its other imports. Its flags are read from a file in the user's cache, which is made
anew after any of this repository's files has changed; only then is the command itself imported.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

HOME = Path(__file__).parent
MAX_HELP = 80  # characters

Spec = dict[str, Any]


def complete(command: str) -> None:
    """Prints what can stand at the cursor, as argcomplete's environment variables ask for it, and ends the process.

    Args:
        command: the name of the script, without `.py`.
    """
    import argcomplete

    parser = build(load(command), argparse.ArgumentParser(prog=f"{command}.py", allow_abbrev=False))
    argcomplete.autocomplete(parser, default_completer=argcomplete.completers.SuppressCompleter())


# What a command takes


def load(command: str) -> Spec:
    """What a command takes: from the cache, unless that is older than this repository."""
    stamp = [[path.name, path.stat().st_mtime_ns, path.stat().st_size] for path in sorted(HOME.glob("*.py"))]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = hashlib.sha256(os.fsencode(HOME)).hexdigest()[:12]
    path = root / "deep-metric-learning" / f"{command}-{place}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        cached = json.loads(path.read_text(encoding="utf-8"))
        if cached["stamp"] == stamp:
            return cached["spec"]
    spec = describe(find_parser(command), known_names())
    if command == "check":  # `check.py NAME` and `check.py split NAME` take nearly the same flags
        spec["flags"][0] |= {"nargs": "*", "names": [*spec["flags"][0]["names"], "split"]}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps({"stamp": stamp, "spec": spec}), encoding="utf-8")
        os.replace(beside, path)
    return spec


def find_parser(command: str) -> argparse.ArgumentParser:
    """A command's own parser."""
    module = importlib.import_module("config" if command == "main" else command)
    own = ("check.py", module.add_arguments) if command == "check" else ()
    return module.build_parser(*own)


def known_names() -> dict[str, list[str]]:
    """The names that flags without `choices` take, beside others."""
    import datasets
    import losses
    import netlib

    all_losses = [*losses.LOSSES, *losses.LIBRARY_LOSSES]
    return {
        "loss": all_losses,
        "losses": all_losses,
        "sampling": [*losses.Sampler().methods, *losses.LIBRARY_MINERS, "none"],
        "distance": [*losses.LIBRARY_DISTANCES],
        "reducer": [*losses.LIBRARY_REDUCERS],
        "regularizer": [*losses.LIBRARY_REGULARIZERS],
        "arch": [*netlib.ARCHS],
        "dataset": [*datasets.DATASETS],
    }


def describe(parser: argparse.ArgumentParser, names: dict[str, list[str]]) -> Spec:
    """What a parser takes, as plain values."""
    from auxiliaries import user_path

    spec: Spec = {"flags": [], "commands": {}}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            spec["commands"] |= {name: describe(one, names) for name, one in action.choices.items()}
        elif action.dest != "help":
            spec["flags"].append(
                {
                    "options": [option for option in action.option_strings if "~" not in option],
                    "dest": action.dest,
                    "nargs": action.nargs,
                    "names": names.get(action.dest) or _choices(action),
                    "is_path": action.type in (user_path, Path),
                    "help": _shorten(action.help or ""),
                }
            )
    spec["flags"] = [flag for flag in spec["flags"] if flag["options"] or not flag["dest"].startswith("-")]
    return spec


def _choices(action: argparse.Action) -> list[str]:
    """The names that a flag takes, as far as it says so."""
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    return action.metavar.split("|") if isinstance(action.metavar, str) and "|" in action.metavar else []


def _shorten(text: str) -> str:
    """A flag's help in a few words, as some shells show it beside the flag."""
    if text == argparse.SUPPRESS:
        return text
    text = " ".join(text.replace("%%", "percent").split()).replace("%", "")
    return text if len(text) <= MAX_HELP else f"{text[:MAX_HELP].rsplit(' ', 1)[0]} …"


# The parser that argcomplete goes through


class _Taken(argparse.Action):
    """A flag whose value isn't looked at."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values)


def build(spec: Spec, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Makes a parser take what `describe` found."""
    for flag in spec["flags"]:
        options = flag["options"] or [flag["dest"]]
        named = {"dest": flag["dest"]} if flag["options"] else {}
        action = parser.add_argument(*options, action=_Taken, nargs=flag["nargs"], help=flag["help"], **named)
        completer = _completer(flag["dest"], flag["names"], flag["is_path"])
        if completer is not None:
            action.completer = completer  # type: ignore[attr-defined]
    if spec["commands"]:
        commands = parser.add_subparsers(dest="command")
        for name, one in spec["commands"].items():
            build(one, commands.add_parser(name, allow_abbrev=False))
    return parser


def _completer(dest: str, names: list[str], is_path: bool) -> Callable[..., Iterable[str]] | None:
    """What gives the values of a flag; None for one whose values can't be listed."""
    on_disk = ON_DISK.get(dest)
    if names or on_disk:
        return lambda **_: [*names, *(on_disk() if on_disk else ())]
    if is_path:
        from argcomplete.completers import FilesCompleter

        return FilesCompleter()
    return None


# What is found on disk, from where the command line is typed


def dataset_folders() -> Iterator[str]:
    """The folders and CSV files in Datasets."""
    return (path.name for path in Path("Datasets").glob("*") if path.is_dir() or path.suffix.lower() == ".csv")


def run_folders() -> Iterator[str]:
    """The folders of runs in Training_Results."""
    return (str(path.parent) for path in Path("Training_Results").glob("*/*/config.yaml"))


def run_names() -> Iterator[str]:
    """The names of these runs."""
    return (Path(folder).name for folder in run_folders())


def presets() -> Iterator[str]:
    """The files in configs."""
    return (path.stem for path in (HOME / "configs").glob("*.yaml"))


ON_DISK: dict[str, Callable[[], Iterable[str]]] = {
    "dataset": dataset_folders,
    "savename": run_names,
    "config": presets,
    **dict.fromkeys(("evaluate", "reproduce_results", "run", "runs", "folder", "folders"), run_folders),
}
