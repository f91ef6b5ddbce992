"""Flags in layers: YAML files, later ones over earlier ones, and the command line over all.

A file's entries are parsed exactly as flags are: raw scalars go to argparse, so that `1e-4` is a number and a savename
of `012` stays what it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from auxiliaries import FlagParser, UserError, nearest_name, number, plain, replacing

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
    """Declares --config, and the flags that say what to do with a run, which are no part of its configuration."""
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--config",
        nargs="+",
        metavar="FILE",
        help="YAML files of flags, later ones over earlier ones; a bare name is looked up in configs/; other flags win",
    )

    group = parser.add_argument_group("finished and interrupted runs")
    group.add_argument(
        "--resume_training",
        nargs="?",
        const="latest",
        choices=("latest", "best"),
        help="go on with the run --savename, with its own flags and those given beside this one, after its latest or "
        "its best epoch",
    )
    group.add_argument(
        "--reproduce_results", metavar="FOLDER", help="run the configuration of a run folder again, and compare"
    )
    group.add_argument(
        "--evaluate",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="evaluate the best network of a run, in FOLDER or of --savename, without training",
    )
    group.add_argument(
        "--splits_to_eval",
        nargs="+",
        choices=("train", "val", "test"),
        help="--evaluate: on which images (default: test)",
    )
    group.add_argument(
        "--eval_reference_set",
        choices=("compared_to_self", "compared_to_sets_combined", "compared_to_training_set"),
        help="--evaluate: where queries search: in their own set (or its gallery), in all --splits_to_eval together, "
        "or in the training images, which hold none of the other splits' classes (default: compared_to_self)",
    )
    group.add_argument(
        "--eval_normalize_embeddings",
        action=argparse.BooleanOptionalAction,
        help="--evaluate: scale embeddings to length 1 (default: as trained)",
    )
    group.add_argument(
        "--eval_use_trunk_output",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="--evaluate: the backbone's features instead of embeddings",
    )
    group.add_argument("--eval_pca", type=number(int, 1), metavar="N", help="--evaluate: on N principal components")
    group.add_argument(
        "--eval_size_of_tsne",
        type=number(int, 10),
        metavar="N",
        help="--evaluate: draw a t-SNE of N images of each set, class by class",
    )


def control_flags() -> FlagParser:
    """A parser of no more than the flags that are no part of a run's configuration."""
    parser = FlagParser(add_help=False)
    add_arguments(parser)
    return parser


def parse_layers(parser: FlagParser, argv: Sequence[str], stored: Path | None = None) -> argparse.Namespace:
    """Parses the command line on top of the files that its --config names, on top of a `stored` configuration.

    Raises:
        UserError: a file or an entry is no good; it names the file, the line and the nearest flag.
    """
    return parser.parse_args([*_tokens_of_files(parser, argv, stored), *argv])


def given_flags(parser: FlagParser, argv: Sequence[str]) -> dict[str, Any]:
    """The flags that the command line, or a file that it names, gives."""
    nothing = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([]))))
    given = parser.parse_args([*_tokens_of_files(parser, argv), *argv], nothing)
    return {name: value for name, value in vars(given).items() if value is not None}


def _tokens_of_files(parser: FlagParser, argv: Sequence[str], stored: Path | None = None) -> list[str]:
    """What a user would have typed instead of a stored configuration and the files that --config names."""
    layers: list[tuple[str, list[str]]] = []
    opt, _ = parser.parse_known_args(argv)
    for name in [*([str(stored)] if stored else []), *(opt.config or [])]:
        layers = _merge(layers, read_layer(name, parser))
    return [token for _, tokens in layers for token in tokens]


def configuration(opt: argparse.Namespace) -> dict[str, Any]:
    """Every flag that says what a run is, as built-in types."""
    control = vars(control_flags().parse_args([]))
    return {name: value for name, value in plain(vars(opt)).items() if name not in control}


def differences(before: argparse.Namespace, after: argparse.Namespace) -> dict[str, Any]:
    """The flags of `after`'s configuration that differ from `before`'s, but for the run folder's name and place."""
    old, new = configuration(before), configuration(after)
    return {name: new[name] for name in new if name not in ("savename", "save_path") and new[name] != old.get(name)}


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
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{where}: a flag's name is a plain word")
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
    return [*((flag, tokens) for flag, tokens in layers if flag.removesuffix(OVERRIDE) not in reset), *layer]


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
    if isinstance(node, yaml.MappingNode | yaml.SequenceNode):
        parts = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else [entry])]
        if not all(isinstance(part, yaml.ScalarNode) for part in parts):
            raise UserError(f"{flag} takes plain values, not lists or mappings of more lists or mappings")
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


def save_config(path: Path, values: Mapping[str, Any], parser: FlagParser) -> None:
    """Writes flags; with all those of a resolved `opt`, `--config path` gives the same run."""
    flags = {name: value for name, value in values.items() if f"--{name}" in parser.flags()}
    with replacing(path) as beside:
        beside.write_text(yaml.safe_dump(flags, sort_keys=False, allow_unicode=True), encoding="utf-8")
