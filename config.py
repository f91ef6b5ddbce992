"""Flags in layers: YAML files, later ones over earlier ones, and the command line over all.

A file's entries are parsed exactly as flags are: raw scalars go to argparse, so that `1e-4` is a number and a savename
of `012` stays what it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from auxiliaries import FlagParser, UserError, nearest_name, replacing

OVERRIDE = "~OVERRIDE~"
PRESETS = Path(__file__).parent / "configs"


class MappingAction(argparse.Action):
    """A flag of `key=value …`, which merges key by key with what earlier layers gave.

    With the suffix `~OVERRIDE~` on the flag it replaces what they gave.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        names = [name for option in option_strings for name in (option, option + OVERRIDE)]
        super().__init__(names, dest, nargs="*", metavar="key=value", **kwargs)

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        merged = {} if str(option_string).endswith(OVERRIDE) else dict(getattr(namespace, self.dest) or {})
        for entry in values:
            key, equals, value = entry.partition("=")
            if not equals or not key:
                raise UserError(f"{option_string} {entry} is not of the form key=value")
            merged[key] = value
        setattr(namespace, self.dest, merged)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --config."""
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--config",
        nargs="+",
        metavar="FILE",
        help="YAML files of flags, later ones over earlier ones; a bare name is looked up in configs/; other flags win",
    )


def parse_layers(parser: FlagParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line on top of the files that its --config names.

    Raises:
        UserError: a file or an entry is no good; it names the file, the line and the nearest flag.
    """
    files = FlagParser(add_help=False)
    add_arguments(files)
    layers: list[tuple[str, list[str]]] = []
    opt, _ = files.parse_known_args(argv)
    for name in opt.config or []:
        layers = _merge(layers, read_layer(name, parser))
    return parser.parse_args([*(token for _, tokens in layers for token in tokens), *argv])


def read_layer(name: str, parser: FlagParser) -> list[tuple[str, list[str]]]:
    """Reads a file's entries as (flag, command-line tokens); an entry without tokens goes back to the default."""
    path = _find(name)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path} is no mapping of flags to values")
    layer: list[tuple[str, list[str]]] = []
    for key_node, value_node in root.value:
        where = f"{path}, line {key_node.start_mark.line + 1}"
        try:
            flag, tokens = _as_tokens(str(key_node.value), value_node, parser)
            parser.parse_args(tokens)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if any(flag == other for other, _ in layer):
            raise UserError(f"{where}: {flag} is given twice")
        layer.append((flag, tokens))
    return layer


def _merge(layers: list[tuple[str, list[str]]], layer: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Puts a layer over others: an entry without tokens removes those of its flag."""
    reset = {flag for flag, tokens in layer if not tokens}
    return [*((flag, tokens) for flag, tokens in layers if flag not in reset), *layer]


def _find(name: str) -> Path:
    path, preset = Path(name), PRESETS / f"{name}.yaml"
    if path.is_file():
        return path
    if path.suffix or path.name != name:
        raise UserError(f"--config {name} is no file")
    if not preset.is_file():
        near = nearest_name(name, [file.stem for file in PRESETS.glob("*.yaml")])
        raise UserError(f"--config {name} is neither a file nor one in configs/{near}")
    return preset


def _as_tokens(key: str, node: yaml.Node, parser: FlagParser) -> tuple[str, list[str]]:
    """An entry as its flag and what a user would have typed."""
    flag = f"--{key}"
    action = parser.flags().get(flag)
    if action is None or key in ("config", "help"):
        raise UserError(f"unknown flag {flag}{nearest_name(flag, parser.flags())}")
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
        return flag, []
    if isinstance(node, yaml.MappingNode) and isinstance(action, MappingAction):
        return flag, [flag, *(f"{name.value}={value.value}" for name, value in node.value)]
    if isinstance(node, yaml.SequenceNode) and action.nargs in ("*", "+"):
        return flag, [flag, *(item.value for item in node.value)]
    if not isinstance(node, yaml.ScalarNode) or isinstance(action, MappingAction):
        raise UserError(f"{flag} takes {'a mapping' if isinstance(action, MappingAction) else 'a plain value'}")
    if isinstance(action, argparse.BooleanOptionalAction):
        if node.value.lower() not in ("true", "false"):
            raise UserError(f"{flag} takes true or false, not {node.value}")
        return flag, [flag if node.value.lower() == "true" else f"--no-{key}"]
    return flag, [flag, node.value] if action.nargs in ("*", "+") else [f"{flag}={node.value}"]


def save_config(path: Path, opt: argparse.Namespace, parser: FlagParser) -> None:
    """Writes every flag of the resolved `opt`; `--config path` gives the same run."""
    values = {name: value for name, value in vars(opt).items() if f"--{name}" in parser.flags() and name != "config"}
    with replacing(path) as beside:
        beside.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
